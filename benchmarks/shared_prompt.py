"""Time of teacher scoring and of the update with what the samples of a group begin with computed once, against a row for each
sample.

In one process, in rounds: both ways once, in an order of its own each round; figures are medians of the ratios within a round.
Each row also says how many tokens either way computes, padding included, and how far the teacher's scores are apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "templates" / "quickstart"
WIDE: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 3840,
    "num_hidden_layers": 14,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "vocab_size": 32_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A step: so many prompts of a length, answers to each, and the tokens of an answer, at least and at most."""

    prompts: int
    prompt: int
    group: int
    shortest: int
    longest: int
    ids: int


SIZES = {
    "quickstart": Size(prompts=32, prompt=28, group=4, shortest=36, longest=36, ids=258),
    "quickstart, lengths differ": Size(
        prompts=32, prompt=28, group=4, shortest=4, longest=36, ids=258
    ),
    "107M from 302M": Size(prompts=2, prompt=200, group=4, shortest=64, longest=64, ids=31_900),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--quick", action="store_true", help="one round, nothing is written")
    given = parser.parse_args()
    import torch
    from common import write_results

    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for name in given.sizes:
        rows += measure(name, 1 if given.quick else given.rounds)
    if not given.quick:
        print(f"written to {write_results('shared_prompt', rows)}")


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    from rnow.algorithm.records import sampled_logprobs
    from rnow.models.scoring import plan_samples

    size = SIZES[name]
    samples = draw_samples(size)
    models = load(name, size)
    teachers = {way: teacher_of(lm) for way, lm in both_ways(models["teacher"]).items()}
    policy = policy_of(models["student"])
    students = both_ways(policy.lm)
    batch = batch_of(samples)

    def update(way: str) -> None:
        policy.lm = students[way]
        policy._accumulate(batch)

    stages: dict[str, Callable[[str], object]] = {
        "teacher": lambda way: teachers[way].score_now(samples),
        "update": update,
    }
    found = {way: teacher.score_now(samples) for way, teacher in teachers.items()}
    apart = max(
        (sampled_logprobs(found["shared"][s.id]) - sampled_logprobs(found["separate"][s.id]))
        .abs()
        .max()
        .item()
        for s in samples
    )
    tokens = {
        way: computed_tokens(samples, plan_samples(lm, samples, 4096))
        for way, lm in both_ways(models["teacher"]).items()
    }
    rows = []
    for stage, work in stages.items():
        ratios, seconds = rounds_of(work, rounds)
        row = {
            "size": name, "stage": stage, "ratio": statistics.median(ratios), "tokens": tokens, "apart": apart,
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
            "seconds": {way: statistics.median(mine) for way, mine in seconds.items()},
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:28}{stage:9}{row['seconds']['separate']:8.3f} s -> {row['seconds']['shared']:.3f} s  "
            f"x{row['ratio']:.2f}  {tokens['separate']} -> {tokens['shared']} tokens, apart {apart:.1e}",
            flush=True,
        )
    return rows


def rounds_of(
    work: Callable[[str], object], rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """How many times faster shared is in each round, and the seconds of either way."""
    ways = ["shared", "separate"]
    for way in ways:
        work(way)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    for _ in range(rounds):
        for way in order.sample(ways, 2):
            started = time.perf_counter()
            work(way)
            seconds[way].append(time.perf_counter() - started)
    return [a / b for a, b in zip(seconds["separate"], seconds["shared"], strict=True)], seconds


def draw_samples(size: Size) -> list[Any]:
    """Random tokens, the same at every start."""
    from rnow.types import Sample

    draw = random.Random(0)
    samples = []
    for number in range(size.prompts):
        prompt = tuple(draw.randrange(3, size.ids) for _ in range(size.prompt))
        for answer in range(size.group):
            length = draw.randint(size.shortest, size.longest)
            ids = (*prompt, *(draw.randrange(3, size.ids) for _ in range(length)))
            samples.append(
                Sample(
                    id=f"p/{number}#{answer}",
                    dataset="d",
                    token_ids=ids,
                    loss_mask=(False,) * len(prompt) + (True,) * length,
                    sampler_logprobs=(0.0,) * len(prompt) + (-5.0,) * length,
                )
            )
    return samples


def load(name: str, size: Size) -> dict[str, Any]:
    import torch

    from rnow.models.loading import load_causal_lm

    def read(folder: Path) -> Any:
        return load_causal_lm(
            folder, vocabulary=size.ids, dtype=torch.float32, device=torch.device("cpu")
        )

    roles = ("student", "teacher")
    if name.startswith("quickstart"):
        return {role: read(QUICKSTART / role) for role in roles}
    from random_models import HUNDRED_MILLION, write_model

    with tempfile.TemporaryDirectory() as folder:
        for role, shape in zip(roles, (HUNDRED_MILLION, WIDE), strict=True):
            write_model(Path(folder, role), shape, ids=size.ids)
        return {role: read(Path(folder, role)) for role in roles}


def both_ways(lm: Any) -> dict[str, Any]:
    """The model as it is loaded, and with a row for each sample."""
    if lm.sharing is None:
        raise SystemExit(f"this model shares no rows: {lm.separate}")
    return {"shared": lm, "separate": replace(lm, sharing=None)}


def teacher_of(lm: Any) -> Any:
    from rnow.teacher.transformers import TransformersTeacher

    return TransformersTeacher(lm)


def policy_of(lm: Any) -> Any:
    from rnow.algorithm.policy_gradient import PolicyGradient
    from rnow.policy.student import LoraPolicy, OptimizerSettings

    return LoraPolicy(
        lm,
        rank=32,
        alpha=64,
        seed=0,
        base_name="x",
        objective=PolicyGradient(kl_penalty_coef=1.0),
        optimizer=OptimizerSettings(),
    )


def batch_of(samples: Sequence[Any]) -> Any:
    import torch

    from rnow.algorithm.batching import build_batch, build_training_samples
    from rnow.algorithm.records import SampledEvidence

    evidence = {
        sample.id: SampledEvidence(teacher_logprobs=torch.full((sum(sample.loss_mask),), -4.0))
        for sample in samples
    }
    return build_batch(
        build_training_samples(samples, {sample.id: 0.0 for sample in samples}, evidence)
    )


def computed_tokens(samples: Sequence[Any], plan: Sequence[Any]) -> int:
    """Tokens of all passes, padding included."""
    from rnow.algorithm.batching import pad

    return sum(
        pad([samples[index] for index in part.indices], "cpu", part.per_row).token_ids.numel()
        for part in plan
    )


if __name__ == "__main__":
    main()
