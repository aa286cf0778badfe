"""Teacher scoring and update: LoRA layers in fused products against PEFT's own, heads in tiles against whole rows.

In one process, in alternating rounds: every form once, in an order of its own each round; figures are medians of the ratios
within a round, by this process's own time (a busy machine counts for less). Sizes: the quickstart's models at 128 x 36 tokens, a
narrow body with a vocabulary of 151,936 at 16 x 64, and a student of 107 million parameters at 8 x 64.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

FORMS = ("as it is", "PEFT's LoRA layers", "whole rows", "both")
"""``whole rows``: chunks of 64 MB of logits, as before tiles."""
SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"student": (128, 2), "teacher": (128, 3), "vocabulary": 260, "rows": 128, "prompt": 12, "answer": 36},
    "wide vocabulary": {"student": (256, 2), "teacher": (512, 2), "vocabulary": 151_936, "rows": 16, "prompt": 64, "answer": 64},
    "107M": {"student": (768, 12), "teacher": (1280, 14), "vocabulary": 32_000, "rows": 8, "prompt": 64, "answer": 64},
}  # fmt: skip
"""Hidden size and layers of both models."""
OBJECTIVES = ("sampled", "exact reverse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    given = parser.parse_args()
    import torch
    from common import write_results

    torch.set_num_threads(given.threads)
    rows = [
        row
        for size in given.sizes
        for objective in given.objectives
        for row in time_forms(size, objective, given.rounds)
    ]
    print(f"written to {write_results('update', rows)}")


def time_forms(size: str, objective: str, rounds: int) -> Iterator[dict[str, Any]]:
    score, update = stages_of(objective, **SIZES[size])
    seconds: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    order = random.Random(0)
    for number in range(rounds + 1):
        for form in order.sample(FORMS, len(FORMS)):
            with formed(form, update.model):
                started = time.process_time()
                evidence = score()
                scored = time.process_time()
                update(evidence)
                ended = time.process_time()
            if number:  # the first round sets up the optimizer's state
                seconds[form].append((scored - started, ended - scored))
    print(f"{size} {SIZES[size]}, {objective}: seconds of teacher and update, times as it is")
    for form in FORMS:
        pairs = [*zip(seconds[form], seconds["as it is"], strict=True)]
        row: dict[str, Any] = {"size": size, "objective": objective, "form": form}
        for stage, name in enumerate(("teacher", "update")):
            row[name] = statistics.median(mine[stage] for mine, _ in pairs)
            row[f"{name}_ratio"] = statistics.median(a[stage] / b[stage] for a, b in pairs)
        row["ratio"] = statistics.median(sum(a) / sum(b) for a, b in pairs)
        row["ratios"] = sorted(round(sum(a) / sum(b), 3) for a, b in pairs)
        print(
            f"  {form:20}{row['teacher']:9.3f}{row['update']:9.3f}"
            f"{row['teacher_ratio']:8.2f}{row['update_ratio']:8.2f}, together {row['ratio']:.2f}",
            flush=True,
        )
        yield row


@contextmanager
def formed(form: str, model: Any) -> Iterator[None]:
    """The student's layers and both heads in a form."""
    from peft.tuners.lora import Linear

    from rnow.policy.fused import fuse_lora

    with ExitStack() as stack:
        if form in ("whole rows", "both"):
            for module in ("head", "exact", "topk"):
                stack.enter_context(mock.patch(f"rnow.algorithm.{module}.tiling_for", whole_rows))
        if form in ("PEFT's LoRA layers", "both"):
            for module in model.modules():
                if isinstance(module, Linear):
                    module.__class__ = Linear
        try:
            yield
        finally:
            fuse_lora(model)


def whole_rows(head: Any, *, kept: bool = False) -> Any:
    from rnow.algorithm.head import Tiling

    rows = max(16, 64 * 2**20 // (4 * head.vocabulary))
    return Tiling(rows=rows, width=head.vocabulary)


class Update:
    """One update on the same samples each time."""

    def __init__(self, policy: Any, samples: Any) -> None:
        self.model = policy.model
        self._policy, self._samples = policy, samples

    def __call__(self, evidence: Any) -> None:
        from rnow.algorithm.batching import build_batch, build_training_samples

        zeros = {sample.id: 0.0 for sample in self._samples}
        self._policy.update(build_batch(build_training_samples(self._samples, zeros, evidence)))


def stages_of(
    name: str,
    *,
    student: tuple[int, int],
    teacher: tuple[int, int],
    vocabulary: int,
    rows: int,
    prompt: int,
    answer: int,
) -> tuple[Callable[[], Any], Update]:
    """What scores, and what updates on the scores."""
    import torch
    from common import qwen3
    from objectives import STEPS

    from rnow.models.loading import take_apart
    from rnow.policy.student import LoraPolicy, OptimizerSettings
    from rnow.teacher.transformers import TransformersTeacher
    from rnow.types import Sample

    models = []
    for seed, (hidden, layers) in enumerate((student, teacher)):
        model = qwen3(vocabulary=vocabulary, hidden=hidden, layers=layers, seed=seed)
        models.append(take_apart(model, vocabulary=vocabulary))
        models[-1].model.requires_grad_(False)
    trained, judge = models
    generator = torch.Generator().manual_seed(1)
    samples = [
        Sample(
            id=f"d/{index}#0",
            dataset="d",
            token_ids=tuple(
                torch.randint(vocabulary, (prompt + answer,), generator=generator).tolist()
            ),
            loss_mask=(*[False] * prompt, *[True] * answer),
            sampler_logprobs=(*[0.0] * prompt, *[-5.0] * answer),
        )
        for index in range(rows)
    ]
    objective = STEPS[name]({"teacher": judge.head})
    policy = LoraPolicy(
        trained,
        rank=32,
        alpha=64,
        seed=0,
        base_name="benchmark",
        objective=objective,
        optimizer=OptimizerSettings(),
    )
    scorer = TransformersTeacher(judge)
    return lambda: scorer.score_now(samples, objective.needs), Update(policy, samples)


if __name__ == "__main__":
    main()
