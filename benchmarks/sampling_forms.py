"""What each part of the embedded sampler's loop saves: the loop as it is, and with one part after another put back.

The student of the quickstart (128 rows of 36 tokens), a student of 107 million parameters with grouped queries (8 rows) and
a tiny body under a vocabulary of 151,936 (16 rows), each with prompts of one length and of mixed lengths. The ways alternate
in one process on one thread; figures are its processor time, which other processes move less than the clock's.

    python benchmarks/sampling_forms.py [--rounds N] [--only quickstart|grouped|vocabulary]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import write_results
from random_models import HUNDRED_MILLION
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.models.attention import register_grouped_attention
from rnow.models.loading import CausalLM, load_causal_lm, take_apart
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling import decode as loop
from rnow.sampling.transformers import TransformersSampler
from rnow.types import Completion, SamplingParams

QUICKSTART = Path(__file__).resolve().parents[1] / "templates" / "quickstart" / "student"
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
Prompts = Sequence[tuple[int, ...]]


@contextmanager
def repeated_keys(sampler: TransformersSampler) -> Any:
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    try:
        yield
    finally:
        register_grouped_attention()


def concatenated_cache(sampler: TransformersSampler) -> Any:
    return patch.object(loop, "build_cache", lambda config, limit: DynamicCache(config=config))


def cumulative_draw(sampler: TransformersSampler) -> Any:
    def draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits, dim=-1)
        cumulative = logprobs.double().exp_().cumsum_(dim=-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True)
        chosen.clamp_(max=logits.shape[-1] - 1)
        return chosen.squeeze(1), logprobs.gather(1, chosen).squeeze(1)

    return patch.object(loop, "draw", draw)


@contextmanager
def turned_weights(sampler: TransformersSampler) -> Any:
    """The merged weights in the other order of memory."""
    merged = sampler._merged
    assert merged is not None
    modules = [merged.lm.model.get_submodule(name) for name in merged._base]
    before = [module.weight for module in modules]
    for module in modules:
        turned = module.weight.detach().t().contiguous().t()
        if turned.stride() == module.weight.stride():
            turned = module.weight.detach().contiguous()
        module.weight = nn.Parameter(turned, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight = weight


PARTS: dict[str, Callable[[TransformersSampler], Any]] = {
    "repeated keys": repeated_keys,
    "concatenated cache": concatenated_cache,
    "cumulative draw": cumulative_draw,
    "other weight order": turned_weights,
}
WAYS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    **{f"with {name}": (name,) for name in PARTS},
    "with all of them": tuple(PARTS),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("quickstart", "grouped", "vocabulary"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (build, count, group, length, tokens) in SIZES.items():
        if options.only not in (None, name):
            continue
        sampler = adapted(build())
        for kind, prompts in {
            "one length": [tuple(range(3 + i, 3 + i + length)) for i in range(count)],
            "mixed": [
                tuple(range(3 + i, 3 + i + length // 2 + i * length // max(1, count - 1)))
                for i in range(count)
            ],
        }.items():
            rows += measure(sampler, prompts, group, tokens, options.rounds, f"{name}, {kind}")
    if options.only is None:
        print(f"written to {write_results('sampling_forms', rows)}")


def adapted(lm: CausalLM) -> TransformersSampler:
    """The sampler of a student whose adapter has left the identity."""
    sampler = TransformersSampler.for_student(lm)
    settings = OptimizerSettings()
    policy = LoraPolicy(
        lm, rank=32, alpha=64, seed=0, base_name="x", objective=PolicyGradient(), optimizer=settings
    )
    with torch.no_grad():
        for name, parameter in policy._parameters.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.002)
    sampler.load_policy(policy.adapter(), version=0)
    return sampler


def quickstart() -> CausalLM:
    cpu = torch.device("cpu")
    return load_causal_lm(QUICKSTART, vocabulary=261, dtype=torch.float32, device=cpu)


def random_model(shape: dict[str, Any]) -> CausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=8192, **shape)).eval()
    return take_apart(model.requires_grad_(False), vocabulary=shape["vocab_size"])


SIZES: dict[str, tuple[Callable[[], CausalLM], int, int, int, int]] = {
    "quickstart": (quickstart, 32, 4, 40, 36),
    "grouped": (lambda: random_model(HUNDRED_MILLION), 4, 2, 128, 32),
    "vocabulary": (lambda: random_model(WIDE), 4, 4, 64, 64),
}
"""How to make the model, distinct prompts, rollouts of each, tokens of a prompt (the mean of the mixed), tokens drawn."""


def measure(
    sampler: TransformersSampler,
    prompts: Prompts,
    group: int,
    tokens: int,
    rounds: int,
    name: str,
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    drawn: dict[str, list[Completion]] = {}
    for number in range(rounds + 1):
        for way, parts in WAYS.items():
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(PARTS[part](sampler))
                started = time.process_time()
                drawn[way] = sample(sampler, prompts, group, tokens)
                if number:  # the first round warms up
                    times[way].append(time.process_time() - started)
    best = statistics.median(times["as it is"])
    rows = []
    print(name)
    for way, values in times.items():
        middle = statistics.median(values)
        same = sum(
            a.token_ids == b.token_ids for a, b in zip(drawn[way], drawn["as it is"], strict=True)
        )
        rows.append(
            {"size": name, "way": way, "seconds": middle, "least": min(values)}
            | {"ratio": middle / best, "same_rows": same, "rows": len(drawn[way])}
        )
        print(
            f"  {way:28}{middle * 1000:9.1f} ms (least {min(values) * 1000:.1f}){middle / best:7.2f} x"
            f"   same rows {same}/{len(drawn[way])}",
            flush=True,
        )
    return rows


def sample(
    sampler: TransformersSampler, prompts: Prompts, group: int, tokens: int
) -> list[Completion]:
    params = SamplingParams(max_tokens=tokens, stop_token_ids=())

    async def one(prompt: tuple[int, ...], seed: int) -> Completion:
        with sampler.live_rollout():
            return await sampler.complete(prompt, params, seed)

    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *(one(p, 1000 * i + k) for i, p in enumerate(prompts) for k in range(group))
        )

    return asyncio.run(everything())


if __name__ == "__main__":
    main()
