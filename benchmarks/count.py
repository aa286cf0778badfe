"""What a step does, by counting: operations, bytes and calls of sampling, teacher, update and sync, per completion token.

Each stage is run on real weights under a counter (operations.py), as it is and with one part after another put back as it was
before: PEFT's own LoRA layers, a row for each sample, heads in whole rows, the sampler's loop of before. The numbers are the same on
every machine. So that they can be held against time, the run also measures the rate of a large matrix product and of copies
(within the cache and beyond it) in the same process: no step is faster than each call's arithmetic at the one or bytes at the
other. ``seconds`` are this process's own for the same work without the counter.

``--card`` counts one layer of Qwen3-8B (forward and backward with recomputation) and of Qwen3-32B (forward) in bfloat16, on torch's
meta device: shapes without numbers. Attention is the fused causal kernel there, as on a card.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import write_results
from operations import Count, Rates, Work
from random_models import qwen3_shape

QUICKSTART = Path(__file__).resolve().parents[1] / "templates" / "quickstart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Prompts and their length, answers to each and theirs, and the shape of both models (those of the quickstart without)."""

    prompts: int
    prompt: int
    group: int
    answer: int
    ids: int
    student: dict[str, int] | None = None
    teacher: dict[str, int] | None = None


SIZES = {
    "a": Size(prompts=32, prompt=28, group=4, answer=36, ids=258),
    "b": Size(
        prompts=4, prompt=64, group=4, answer=64, ids=151_669,
        student=qwen3_shape(256, 2, 8, 32, 151_936), teacher=qwen3_shape(512, 2, 8, 64, 151_936),
    ),
    "c": Size(
        prompts=2, prompt=64, group=4, answer=64, ids=31_900,
        student=qwen3_shape(768, 12, 12, 64, 32_000), teacher=qwen3_shape(1280, 14, 20, 64, 32_000),
    ),
    "tiny": Size(
        prompts=2, prompt=6, group=2, answer=4, ids=300,
        student=qwen3_shape(64, 2, 4, 16, 320), teacher=qwen3_shape(64, 2, 4, 16, 320),
    ),
}  # fmt: skip
"""Those of vs_trl.py, and one to see that it works."""

STAGES = ("sample", "teacher", "update", "sync")
BEFORE = {
    "PEFT's LoRA layers": ("update",),
    "a row for each sample": ("teacher", "update"),
    "heads in whole rows": ("teacher", "update"),
    "the sampler's loop of before": ("sample",),
}
"""What can be put back, and the stages that it concerns."""
AS_IT_IS, ALL = "as it is", "all of these"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=[*SIZES], default=["a", "b", "c"])
    parser.add_argument(
        "--objective", default="exact reverse", help="one of those of objectives.py"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the tiny size; nothing is written")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rates = measure_rates()
    print(
        f"products {rates.product / 1e9:.1f} GFLOP/s, copies {rates.cached / 1e9:.1f} GB/s in the"
        f" cache and {rates.streamed / 1e9:.1f} beyond it"
    )
    rows: list[dict[str, Any]] = [{"what": "rates", **asdict(rates)}]
    for name in ["tiny"] if given.quick else given.sizes:
        rows += count_size(name, given.objective, rates)
    if given.card or given.quick:
        rows += count_layers(tokens=64 if given.quick else 4096)
    if not given.quick:
        print(f"written to {write_results('count', rows)}")


def measure_rates() -> Rates:
    """The best of several tries each: what the machine can do, not what it does on average."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    small, large = torch.zeros(2**17), torch.zeros(2**25)
    return Rates(
        product=2 * 1024**3 / least_seconds(lambda: torch.mm(a, b)),
        cached=8 * small.numel() / least_seconds(lambda: small.add_(1.0)),
        streamed=8 * large.numel() / least_seconds(lambda: large.add_(1.0)),
    )


def least_seconds(work: Callable[[], object], tries: int = 15) -> float:
    work()
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def count_size(name: str, objective: str, rates: Rates) -> Iterator[dict[str, Any]]:
    size = SIZES[name]
    step = Step(size, objective)
    tokens = size.prompts * size.group * size.answer
    print(f"{name}: {tokens} completion tokens; per token MFLOP of products and attention, kB moved by"
          " products, attention, passes, calls; seconds at least, and spent")  # fmt: skip
    for stage in STAGES:
        concerned = [form for form, stages in BEFORE.items() if stage in stages]
        for form in [AS_IT_IS, *concerned, *([ALL] if len(concerned) > 1 else [])]:
            with before([form] if form in BEFORE else concerned if form == ALL else [], step):
                step.run(stage)  # what is set up once
                with Count(rates) as count:
                    step.run(stage)
                started = time.process_time()
                step.run(stage)
                seconds = time.process_time() - started
            yield row_of(count, tokens, size=name, stage=stage, form=form, seconds=seconds)


def row_of(count: Count, tokens: int, *, seconds: float = 0.0, **said: Any) -> dict[str, Any]:
    """One line of the table, printed."""
    products, attention, passes = (
        count.found.get(kind, Work()) for kind in ("products", "attention", "passes")
    )
    print(
        f"  {said['stage']:9}{said['form']:30}{products.flops / tokens / 1e6:10.3f}"
        f"{attention.flops / tokens / 1e6:9.4f}{products.bytes / tokens / 1e3:11.1f}"
        f"{attention.bytes / tokens / 1e3:9.1f}{passes.bytes / tokens / 1e3:11.1f}"
        f"{count.total.calls:9d}{count.total.least_seconds:9.3f}{seconds:9.3f}",
        flush=True,
    )
    most = sorted(count.by_name.items(), key=lambda item: -item[1].bytes)[:8]
    return {
        "what": "count", **said, "tokens": tokens, "seconds": seconds, "total": asdict(count.total),
        "by_kind": {kind: asdict(work) for kind, work in count.found.items()},
        "most_bytes": {name: asdict(work) for name, work in most},
    }  # fmt: skip


class Step:
    """A step's stages on random tokens, each of which can be run again."""

    def __init__(self, size: Size, objective: str) -> None:
        from objectives import STEPS

        from rnow.models.loading import with_sharing
        from rnow.policy.student import LoraPolicy, OptimizerSettings
        from rnow.sampling.transformers import TransformersSampler
        from rnow.teacher.transformers import TransformersTeacher

        student, teacher = (with_sharing(load(size, role)) for role in ("student", "teacher"))
        self._size = size
        self.objective = STEPS[objective]({"teacher": teacher.head})
        self.sampler = TransformersSampler.for_student(student)
        self.policy = LoraPolicy(
            student,
            rank=32,
            alpha=64,
            seed=0,
            base_name="benchmark",
            objective=self.objective,
            optimizer=OptimizerSettings(),
        )
        self.teacher = TransformersTeacher(teacher)
        self.samples = draw_samples(size)
        self.evidence = self.teacher.score_now(self.samples, self.objective.needs)
        self._sync()

    def run(self, stage: str) -> None:
        """One of STAGES."""
        {"sample": self._sample, "teacher": self._score, "update": self._update, "sync": self._sync}[stage]()  # fmt: skip

    def _sample(self) -> None:
        from rnow.sampling.decode import Request
        from rnow.types import SamplingParams

        size = self._size
        params = SamplingParams(max_tokens=size.answer, stop_token_ids=())
        requests = [
            Request(prompt_token_ids=sample.token_ids[: size.prompt], params=params, seed=number)
            for number, sample in enumerate(self.samples)
        ]
        self.sampler._decode(requests, lambda: None)

    def _score(self) -> None:
        self.teacher.score_now(self.samples, self.objective.needs)

    def _update(self) -> None:
        from rnow.algorithm.batching import build_batch, build_training_samples

        zeros = {sample.id: 0.0 for sample in self.samples}
        self.policy.update(build_batch(build_training_samples(self.samples, zeros, self.evidence)))

    def _sync(self) -> None:
        self.sampler.load_policy(self.policy.adapter(), version=1)


def load(size: Size, role: str) -> Any:
    """A model of the quickstart, or a random one, frozen."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rnow.models.loading import load_causal_lm, take_apart

    shape = getattr(size, role)
    if shape is None:
        folder, cpu = QUICKSTART / role, torch.device("cpu")
        return load_causal_lm(folder, vocabulary=size.ids, dtype=torch.float32, device=cpu)
    torch.manual_seed(len(role))
    config = Qwen3Config(max_position_embeddings=8192, tie_word_embeddings=True, **shape)
    return take_apart(Qwen3ForCausalLM(config).eval().requires_grad_(False), vocabulary=size.ids)


def draw_samples(size: Size) -> list[Any]:
    """Groups of answers to random prompts."""
    from rnow.types import Sample

    draw = random.Random(0)
    samples = []
    for number in range(size.prompts):
        prompt = [draw.randrange(3, size.ids) for _ in range(size.prompt)]
        for answer in range(size.group):
            own = [draw.randrange(3, size.ids) for _ in range(size.answer)]
            samples.append(
                Sample(
                    id=f"p/{number}#{answer}",
                    dataset="d",
                    token_ids=(*prompt, *own),
                    loss_mask=(*[False] * size.prompt, *[True] * size.answer),
                    sampler_logprobs=(*[0.0] * size.prompt, *[-5.0] * size.answer),
                )
            )
    return samples


@contextmanager
def before(parts: list[str], step: Step) -> Iterator[None]:
    """The step with these parts as they were before."""
    import sampling_forms
    from update import formed

    with ExitStack() as stack:
        if "PEFT's LoRA layers" in parts:
            stack.enter_context(formed("PEFT's LoRA layers", step.policy.model))
        if "heads in whole rows" in parts:
            stack.enter_context(formed("whole rows", step.policy.model))
        if "the sampler's loop of before" in parts:
            for part in ("repeated keys", "concatenated cache", "cumulative draw"):
                stack.enter_context(sampling_forms.PARTS[part](step.sampler))
        held = step.policy.lm, step.teacher.lm
        if "a row for each sample" in parts:
            step.policy.lm, step.teacher.lm = (replace(lm, sharing=None) for lm in held)
        try:
            yield
        finally:
            step.policy.lm, step.teacher.lm = held


# ---- shapes of a card ------------------------------------------------------------------------------------------------


QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN3_32B = {"hidden_size": 5120, "intermediate_size": 25_600, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def count_layers(tokens: int) -> Iterator[dict[str, Any]]:
    """One layer each, ``tokens`` of one sequence: what a step does in it per token."""
    print(f"one layer in bfloat16, {tokens} tokens of one sequence; columns as above")
    with torch.device("meta"):
        teacher = one_layer(QWEN3_32B)
        inputs = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
            "position_ids": torch.zeros(1, tokens, dtype=torch.int64),
            "attention_mask": {"full_attention": None},
            "use_cache": False,
        }
        with fused_attention(), Count() as count, torch.no_grad():
            teacher.model(**inputs)
        yield row_of(count, tokens, size="Qwen3-32B", stage="teacher", form=AS_IT_IS)
        for form in (AS_IT_IS, "PEFT's LoRA layers"):
            policy = student_layer()
            with ExitStack() as stack:
                if form != AS_IT_IS:
                    from update import formed

                    stack.enter_context(formed(form, policy.model))
                policy._train_mode()
                with fused_attention(), Count() as count:
                    hidden = policy.lm.body(**inputs).last_hidden_state
                    hidden.backward(torch.empty_like(hidden))
            yield row_of(count, tokens, size="Qwen3-8B", stage="update", form=form)


def one_layer(shape: dict[str, int]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(num_hidden_layers=1, vocab_size=1024, dtype=torch.bfloat16, **shape)
    return Qwen3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def student_layer() -> Any:
    from rnow.algorithm.policy_gradient import PolicyGradient
    from rnow.models.loading import take_apart
    from rnow.policy.student import LoraPolicy, OptimizerSettings

    return LoraPolicy(
        take_apart(one_layer(QWEN3_8B), vocabulary=1024),
        rank=32,
        alpha=64,
        seed=0,
        base_name="benchmark",
        objective=PolicyGradient(),
        optimizer=OptimizerSettings(),
        recomputed_layers=None,
    )


@contextmanager
def fused_attention() -> Iterator[None]:
    """transformers' ``sdpa`` as the causal kernel that a card takes; on the meta device torch would choose the unfused one."""
    from transformers import AttentionInterface

    from rnow.models.attention import register_grouped_attention

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        output = kernel(query, key, value, 0.0, True, scale=options["scaling"])[0]
        return output.transpose(1, 2), None

    AttentionInterface.register("sdpa", attend)
    try:
        # Which the meta device has not, so that asking is an error.
        with mock.patch.object(torch, "is_autocast_enabled", return_value=False):
            yield
    finally:
        register_grouped_attention()


if __name__ == "__main__":
    main()
