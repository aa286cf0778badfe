"""What several keys decide together, ``algorithm.kl_estimator`` with ``auto`` above all: one answer for the checks of a
config, the plan and the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rnow.config.teachers import any_crossed, any_served, control_of, teacher_sections

if TYPE_CHECKING:
    from rnow.config.schema import Schema

Estimator = Literal["sampled", "exact", "topk"]


def kl_estimator(config: Schema) -> Estimator:
    """``algorithm.kl_estimator`` with ``auto`` decided. Settings that only ``sampled`` knows choose it; so do sft and midtrain,
    which estimate none."""
    algorithm, taught = config.algorithm, any(teacher_sections(config))
    if not config.on_policy:
        return "sampled"
    if algorithm.kl_estimator != "auto":
        return algorithm.kl_estimator
    if not taught or _knows_only_sampled(config) or algorithm.kl_penalty_coef == 0:
        return "sampled"
    return "topk" if any_served(config) else "exact"


def has_value_head(config: Schema) -> bool:
    """Whether a value head learns beside the adapter: rewards teach, and ``gae`` makes advantages of them."""
    algorithm = config.algorithm
    return config.on_policy and algorithm.adv_estimator == "gae" and algorithm.reward_coef > 0


def drops_equal_groups(config: Schema) -> bool:
    """Whether groups whose rewards are all equal are left out of the update: nothing is learned from them, or it is asked for."""
    algorithm = config.algorithm
    if algorithm.drop_equal_groups != "auto":
        return algorithm.drop_equal_groups
    rewarded = config.dataset_type == "rl" and algorithm.adv_estimator == "grpo"
    return rewarded and algorithm.kl_penalty_coef == 0


def _knows_only_sampled(config: Schema) -> bool:
    """Whether a setting chooses ``kl_estimator: sampled``, since no other knows it."""
    algorithm = config.algorithm
    of_teacher = any_crossed(config) or control_of(config) == "none"
    return algorithm.kl_baseline != "none" or algorithm.kl_discount > 0 or of_teacher
