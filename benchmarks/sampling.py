"""The embedded sampler against transformers' ``generate``: 16 prompts x 4 rollouts x 36 tokens on a tiny student.

Four ways to draw the same number of tokens from the same weights, alternating in one process: generate with the adapter
as a side branch, generate with merged weights, our decode loop with the side branch ("shared"), and merged.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

import torch
from common import qwen3, write_results

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.models.loading import take_apart
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.transformers import TransformersSampler
from rnow.types import SamplingParams

PROMPTS, GROUP, PROMPT_TOKENS, TOKENS, VOCABULARY = 16, 4, 24, 36, 262
REPEATS = 15


def main() -> None:
    lm = take_apart(qwen3(vocabulary=VOCABULARY, hidden=128, layers=2), vocabulary=VOCABULARY)
    lm.model.requires_grad_(False)
    merged = TransformersSampler.for_student(lm)
    policy = LoraPolicy(
        lm,
        rank=32,
        alpha=64,
        seed=0,
        base_name="benchmark",
        objective=PolicyGradient(),
        optimizer=OptimizerSettings(),
    )
    shared = TransformersSampler(lm, mode="shared")
    for sampler in (merged, shared):
        sampler.load_policy(policy.adapter(), version=0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator)

    ways: dict[str, Callable[[], None]] = {
        "generate, adapter": lambda: generate(policy.model, prompts),
        "generate, merged": lambda: generate(merged._lm.model, prompts),
        "ours, shared": lambda: ours(shared, prompts),
        "ours, merged": lambda: ours(merged, prompts),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if repeat >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    best = statistics.median(times["ours, merged"])
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        rows.append({"way": name, "seconds": middle, "ratio_to_ours_merged": middle / best})
        print(f"{name:20}{middle * 1000:8.1f} ms{middle / best:8.2f} x")
    print(f"written to {write_results('sampling', rows)}")


@torch.inference_mode()
def generate(model, prompts: torch.Tensor) -> None:
    model.generate(
        input_ids=prompts.repeat_interleave(GROUP, 0),
        attention_mask=torch.ones(PROMPTS * GROUP, PROMPT_TOKENS, dtype=torch.long),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,  # training needs the log-probabilities too
    )


def ours(sampler: TransformersSampler, prompts: torch.Tensor) -> None:
    params = SamplingParams(max_tokens=TOKENS, stop_token_ids=())

    async def one(row: list[int], seed: int) -> None:
        with sampler.live_rollout():
            await sampler.complete(row, params, seed)

    async def everything() -> None:
        rows = prompts.tolist()
        await asyncio.gather(*(one(rows[i // GROUP], i) for i in range(PROMPTS * GROUP)))

    asyncio.run(everything())


if __name__ == "__main__":
    main()
