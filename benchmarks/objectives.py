"""Time and memory of teacher scoring and update under each objective, against ``sampled``, with a vocabulary of 151,936.

In one process, in rounds: every objective once, in an order of its own each round; figures are medians of the ratios within a
round. Memory is measured in processes of their own at two numbers of tokens: what grows with the vocabulary must not grow with
the tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SEQUENCE = 256
VOCABULARY = 151_936
SIZES = {"narrow": (256, 4), "wide": (512, 4)}
"""Hidden size and layers: the narrower the model, the more of the time is the head's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--child", nargs=2, metavar=("OBJECTIVE", "TOKENS"))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    if given.child:
        name, tokens = given.child
        print(json.dumps(memory_of(name, int(tokens), given.vocabulary)))
        return
    from common import write_results

    rows: list[dict[str, Any]] = []
    for size in given.sizes:
        rows += time_all(size, given.tokens, given.rounds, given.vocabulary)
    for name in STEPS:
        rows.append(memory_row(name, given))
    print(f"written to {write_results('objectives', rows)}")


def time_all(size: str, tokens: int, rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    work = {name: step_of(name, size, tokens, vocabulary) for name in STEPS}
    for step in work.values():
        step()  # the optimizer's state, and whatever is set up once
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample([*work], len(work)):
            started = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - started)
    print(f"{size} ({SIZES[size]}), {tokens} tokens: teacher and update")
    rows = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine, seconds["sampled"], strict=True)]
        row = {
            "what": "time", "size": size, "objective": name, "tokens": tokens,
            "seconds": statistics.median(mine), "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        }  # fmt: skip
        rows.append(row)
        print(f"  {name:22}{row['seconds']:8.2f} s  {row['ratio']:.3f}", flush=True)
    return rows


def memory_row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for tokens in (given.tokens, 4 * given.tokens):
        command = [
            sys.executable, __file__, "--child", name, str(tokens),
            "--vocabulary", str(given.vocabulary), "--threads", str(given.threads),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[tokens] = json.loads(done.stdout.splitlines()[-1])
    few, many = found.values()
    row = {"what": "memory", "objective": name, "bytes": found, "growth": many - few}
    # One more token costs its activations and hidden states; a row of logits would be 4 x V bytes.
    per_token = (many - few) / (3 * given.tokens)
    row["share_of_a_row_of_logits"] = per_token / (4 * given.vocabulary)
    print(
        f"  {name:22}{few / 1e6:8.0f} MB{many / 1e6:8.0f} MB with four times the tokens, "
        f"{row['share_of_a_row_of_logits']:.3f} of a row of logits a token",
        flush=True,
    )
    return row


def memory_of(name: str, tokens: int, vocabulary: int) -> int:
    from common import PeakMemory

    step = step_of(name, "narrow", tokens, vocabulary)
    with PeakMemory() as memory:
        step()
    return memory.extra


def step_of(name: str, size: str, tokens: int, vocabulary: int) -> Callable[[], None]:
    """What scores a batch and updates on it, models of its own loaded."""
    import torch
    from common import qwen3

    from rnow.algorithm.batching import build_batch, build_training_samples
    from rnow.models.loading import take_apart
    from rnow.policy.student import LoraPolicy, OptimizerSettings
    from rnow.teacher.transformers import TransformersTeacher
    from rnow.types import Sample

    hidden, layers = SIZES[size]
    models = []
    for seed in (0, 1):
        model = qwen3(vocabulary=vocabulary, hidden=hidden, layers=layers, seed=seed)
        models.append(take_apart(model, vocabulary=vocabulary))
        models[-1].model.requires_grad_(False)
    student, judge = models
    objective = STEPS[name]({"teacher": judge.head})
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(tokens // SEQUENCE):
        ids = torch.randint(vocabulary, (SEQUENCE + 1,), generator=generator).tolist()
        samples.append(
            Sample(
                id=f"d/{index}#0",
                dataset="d",
                token_ids=tuple(ids),
                loss_mask=(False, *[True] * SEQUENCE),
                sampler_logprobs=(0.0, *[-11.9] * SEQUENCE),
            )
        )
    policy = LoraPolicy(
        student,
        rank=8,
        alpha=16,
        seed=0,
        base_name="benchmark",
        objective=objective,
        optimizer=OptimizerSettings(),
        micro_batch_tokens=4 * SEQUENCE,
    )
    teacher = TransformersTeacher(judge, micro_batch_tokens=4 * SEQUENCE)
    zeros = {sample.id: 0.0 for sample in samples}

    def step() -> None:
        evidence = teacher.score_now(samples, objective.needs)
        policy.update(build_batch(build_training_samples(samples, zeros, evidence)))

    return step


def _sampled(heads: Any) -> Any:
    from rnow.algorithm.policy_gradient import PolicyGradient

    return PolicyGradient()


def _optimal(heads: Any) -> Any:
    from rnow.algorithm.baseline import KlBaseline
    from rnow.algorithm.policy_gradient import PolicyGradient

    return PolicyGradient(baseline=KlBaseline(heads=heads))


def _top_k(k: int) -> Callable[[Any], Any]:
    def make(heads: Any) -> Any:
        from rnow.algorithm.bucket import TopKDivergence

        return TopKDivergence(top_k=k)

    return make


def _exact(divergence: Any) -> Callable[[Any], Any]:
    def make(heads: Any) -> Any:
        from rnow.algorithm.exact import ExactDivergence

        return ExactDivergence(heads=heads, divergence=divergence)

    return make


STEPS: dict[str, Callable[[Any], Any]] = {
    "sampled": _sampled,
    "sampled, optimal": _optimal,
    "topk 20": _top_k(20),
    "topk 64": _top_k(64),
    "exact reverse": _exact("reverse"),
    "exact forward": _exact("forward"),
    "exact jsd": _exact("jsd"),
}


if __name__ == "__main__":
    main()
