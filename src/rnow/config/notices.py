"""Settings that are valid but deserve a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rnow.config.schema import Schema


def find_notices(config: Schema) -> list[str]:
    """One line for each such setting."""
    notices: list[str] = []
    rollout = config.rollout
    cuts = [f"top_p {rollout.top_p:g}"] if rollout.top_p < 1 else []
    cuts += [f"top_k {rollout.top_k}"] if rollout.top_k > 0 else []
    if cuts and config.on_policy:
        notices.append(
            f"rollout: with {' and '.join(cuts)} the sampled distribution differs from the trained one"
        )
    algorithm = config.algorithm
    untaught = config.on_policy and algorithm.reward_coef == 0
    if untaught and algorithm.adv_estimator != "grpo":
        notices.append(
            f"algorithm.adv_estimator {algorithm.adv_estimator} has no effect with reward_coef 0: rewards are tracked only"
        )
    if config.trainer.max_billing is not None:
        notices.append("trainer.max_billing is ignored: nothing is billed here")
    if any(entry.eval_id is not None for entry in config.evals):
        notices.append(
            "evals: eval_id is ignored; local runs evaluate the held-out prompts (data.val_split)"
        )
    return notices
