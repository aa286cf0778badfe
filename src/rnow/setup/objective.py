"""Config -> what the update minimises. Which objective a config asks for is decided here and nowhere else."""

from __future__ import annotations

from rnow.algorithm.objective import Objective
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.config import Config


def build_objective(config: Config) -> Objective:
    """The objective of the config's ``algorithm`` section."""
    algorithm = config.algorithm
    assert algorithm.kl_estimator == "sampled", "the others are refused by refuse_reserved"
    return PolicyGradient(
        loss_fn=algorithm.loss_fn,
        kl_penalty_coef=algorithm.kl_penalty_coef,
        reward_coef=algorithm.reward_coef,
        kl_clamp=algorithm.kl_clamp,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        ratio_cap=algorithm.ratio_cap,
        temperature=config.rollout.temperature,
    )
