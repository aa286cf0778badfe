"""Why a step brought nothing, as far as its numbers tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rnow.algorithm.batching import evidence_tensors
from rnow.algorithm.records import StepData

_SAME = (
    "the student gives its tokens the probabilities that its reference gives them",
    "in distill, name another model at teacher.path",
)


def why_idle(data: StepData, metrics: Mapping[str, float]) -> tuple[str, str]:
    """Why every gradient of a step was zero, or all its groups were left out, and what to do about it."""
    if data.left_out or metrics.get("advantage/std") == metrics.get("advantage/mean") == 0.0:
        facts, fixes = [], []
        errors = [text for result in data.rewards.values() for text in result.errors.values()]
        if errors and all(result.errors for result in data.rewards.values()):
            facts.append(f"every reward failed ({errors[0]})")
            fixes.append("mend the reward function")
        elif not any(item.reward_advantage for item in data.training) and data.rewards:
            facts.append("all rollouts of each group have the same reward")
            fixes.append(
                "let rewards differ between answers to one prompt, choose prompts of another difficulty, or raise "
                "data.group_size; `rnow rollouts NAME` shows the answers"
            )
        if metrics.get("teacher_kl") == 0.0:
            facts.append(_SAME[0])
            fixes.append(_SAME[1])
        return (
            ", and ".join(facts) or "no token has an advantage",
            "; ".join(fixes) or "look at `rnow rollouts NAME`, and try `rnow test`",
        )
    if metrics.get("clip_fraction", 0.0) > 0.0:
        return (
            "every token with an advantage is clipped: sampler and trainer disagree (ratio/mean, sampler_trainer_kl)",
            "give sampler and student the same dtype and quantization, or raise algorithm.clip_ratio_low and "
            "algorithm.clip_ratio_high",
        )
    if metrics.get("teacher_kl") == 0.0:  # of an objective without advantages
        return _SAME
    return (
        "the gradient is smaller than the student's number format can hold",
        "set model.dtype: float32 or bfloat16",
    )


def why_skipped(
    data: StepData, *, broken: Counter[str], non_finite: bool
) -> tuple[str | None, str]:
    """Why a step brought no update, as far as that is known, and what to do about it. ``broken``: of ``broken_evidence``."""
    if not non_finite:
        errors = [r.error for group in data.groups for r in group.rollouts if r.error]
        return (
            next(iter(errors), None),
            "look at `rnow rollouts NAME`, and try `rnow test`",
        )
    if broken:
        role, count = broken.most_common(1)[0]
        key = "teacher.dtype" if role == "teacher" else f"the dtype of {role}"
        return (
            f"the {role}'s log-probabilities of {count} of {len(data.training)} rollouts are not finite",
            f"set {key}: float32 (float16 overflows), or check the teacher's weights",
        )
    return (
        "the loss or its gradient is not finite",
        "lower trainer.learning_rate, or set model.dtype: float32",
    )


def broken_evidence(data: StepData) -> Counter[str]:
    """By teacher, how many samples it judged with numbers that are not finite."""
    return Counter(
        item.sample.teacher or "teacher"
        for item in data.training
        if item.evidence is not None
        and not all(
            bool(tensor.isfinite().all()) for tensor in evidence_tensors(item.evidence).values()
        )
    )
