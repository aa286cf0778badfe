"""The checks before the first step that need the models awake: a few seconds that save an hour of nonsense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rnow.algorithm.batching import at_loss_tokens, build_samples
from rnow.algorithm.records import SAMPLED, Evidence, sampled_logprobs
from rnow.errors import ModelError
from rnow.protocols import Environment, Sampler, Teacher
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.training.residency import Residency
from rnow.types import Prompt, Sample

PROMPTS = 4
REPEAT_TOLERANCE = 5e-2
"""Nats per token, on average, by which a teacher may differ from itself: a server in bfloat16 rounds differently with what else
is in its batch. Dropout is meant to be found, and moves whole answers."""
POSITIVE_TOLERANCE = 1e-4
CONSTANT_TOLERANCE = 1e-4
GAP_NOTE = 0.05
_FIX = "check that the {who}'s weights match its config (dtype, quantization, a complete download)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """What was found.

    Attributes:
        max_gap: the largest |sampler logprob - trainer logprob| over the sampled tokens, nats.
        teacher_kl: mean student - teacher logprob over the same tokens, or None without a teacher.
        notes: what the user should know.
    """

    max_gap: float
    teacher_kl: float | None
    notes: tuple[str, ...]


async def run_selfcheck(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    trainer_as_teacher: Teacher,
    teacher: Teacher | None,
    environments: Callable[[Prompt, int], Environment],
    settings: RolloutSettings,
    vocabulary: int,
    gpu: Residency,
) -> SelfCheck:
    """Sample a few answers; score them with the trainer's own weights, and twice with the teacher: each of several.

    Args:
        trainer_as_teacher: the student's weights behind the Teacher protocol, so that the student is scored by the very
            path the teacher takes.
        vocabulary: V, to recognise a model that answers -ln V whatever it is asked.

    Raises:
        ModelError: the log-probabilities of the student, its sampler or the teacher cannot be used.
    """
    async with gpu.only("sampler"):
        groups = await collect_rollouts(_chosen(prompts), sampler, environments, settings, step=0)
    samples = build_samples(groups)
    async with gpu.only("trainer"):
        own = _loss_values(samples, await trainer_as_teacher.score(samples, SAMPLED))
    drawn = [v for sample in samples for v in at_loss_tokens(sample, sample.sampler_logprobs)]
    _check_finite("student", own)
    _check_finite("sampler", drawn)
    _check_constant("student", own, vocabulary)
    gaps = [abs(a - b) for a, b in zip(drawn, own, strict=True)]
    mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
    notes = []
    if mean_gap > GAP_NOTE:
        notes.append(
            f"sampler and trainer disagree by {mean_gap:.3g} nats per token on the same weights; usual causes: "
            "a low-precision dtype, a quantised base on one side only, a temperature, or the chat template"
        )
    teacher_kl = None
    if teacher is not None:
        async with gpu.only("teacher"):
            first = await _judge(samples, teacher, vocabulary)
        judged = _loss_values(samples, first)
        teacher_kl = sum(a - b for a, b in zip(own, judged, strict=True)) / max(1, len(own))
    return SelfCheck(
        max_gap=max(gaps, default=0.0),
        teacher_kl=teacher_kl,
        notes=tuple(notes),
    )


async def check_rows(
    samples: Sequence[Sample], student: Teacher, vocabulary: int, gpu: Residency
) -> float:
    """Score a few rows with the student's own weights; the mean loss of their tokens, in nats.

    Args:
        student: its weights behind the Teacher protocol.
        vocabulary: as in ``run_selfcheck``.

    Raises:
        ModelError: the log-probabilities of the student cannot be used.
    """
    async with gpu.only("trainer"):
        own = _loss_values(samples, await student.score(samples, SAMPLED))
    _check_finite("student", own)
    _check_constant("student", own, vocabulary)
    return -math.fsum(own) / len(own)


def _chosen(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first few, and the first of every teacher that judges none of those."""
    chosen = [*prompts[:PROMPTS]]
    for prompt in prompts[PROMPTS:]:
        if all(prompt.teacher != other.teacher for other in chosen):
            chosen.append(prompt)
    return chosen


async def _judge(
    samples: Sequence[Sample], teacher: Teacher, vocabulary: int
) -> dict[str, Evidence]:
    """The evidence of all samples, that of each teacher asked for twice and checked."""
    evidence: dict[str, Evidence] = {}
    for role in dict.fromkeys(sample.teacher for sample in samples):
        own = [sample for sample in samples if sample.teacher == role]
        first = await teacher.score(own, SAMPLED)
        again = await teacher.score(own, SAMPLED)
        _check_teacher(
            role or "teacher", _loss_values(own, first), _loss_values(own, again), vocabulary
        )
        evidence |= first
    return evidence


def _loss_values(samples: Sequence[Sample], evidence: Mapping[str, Evidence]) -> list[float]:
    return [value for sample in samples for value in sampled_logprobs(evidence[sample.id]).tolist()]


def _check_finite(who: str, values: Sequence[float]) -> None:
    """Before anything is compared: every comparison with NaN is false."""
    if bad := [value for value in values if not math.isfinite(value)]:
        raise ModelError(
            f"the {who} gives {len(bad)} non-finite log-probabilities in {len(values)} tokens",
            why="its weights hold NaN or infinity, or its numbers overflow in this dtype (float16 does at 65504)",
            fix=_FIX.format(who=who),
        )


def _check_constant(who: str, values: Sequence[float], vocabulary: int) -> None:
    constant = -math.log(vocabulary)
    if values and all(abs(value - constant) < CONSTANT_TOLERANCE for value in values):
        raise ModelError(
            f"the {who} gives every token the same log-probability, -ln {vocabulary}",
            why="its output does not depend on its input: the weights are zero, or were not loaded",
            fix=_FIX.format(who=who),
        )


def _check_teacher(
    who: str, first: Sequence[float], second: Sequence[float], vocabulary: int
) -> None:
    fix = _FIX.format(who=who)
    _check_finite(who, first)
    if (highest := max(first, default=0.0)) > POSITIVE_TOLERANCE:
        raise ModelError(f"the {who} gives a log-probability above 0 ({highest:.4g})", fix=fix)
    _check_constant(who, first, vocabulary)
    changes = [abs(a - b) for a, b in zip(first, second, strict=True)]
    change = math.fsum(changes) / max(1, len(changes))
    if not change <= REPEAT_TOLERANCE:
        raise ModelError(
            f"the {who} gives other log-probabilities when asked twice (off by {change:.3g} on average)",
            why="training would chase noise",
            fix="switch dropout and other randomness off, or use another dtype for the teacher",
        )
