"""Config -> what the update minimises. Which objective a config asks for is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from rnow.algorithm.baseline import KlBaseline
from rnow.algorithm.bucket import TopKDivergence
from rnow.algorithm.cross_entropy import CrossEntropy
from rnow.algorithm.exact import ExactDivergence
from rnow.algorithm.head import Head
from rnow.algorithm.objective import Objective
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.rewarded import RewardTerm
from rnow.algorithm.value import Valued, ValueHead
from rnow.config import Config
from rnow.config.estimator import has_value_head, kl_estimator
from rnow.plan.choices import reads_hidden_states
from rnow.plan.prepare import Prepared
from rnow.plan.roles import STUDENT

NO_HEADS: Mapping[str, Head] = {}


def build_objective(prepared: Prepared, heads: Mapping[str, Head] = NO_HEADS) -> Objective:
    """The objective of the config's ``algorithm`` section; in sft and midtrain the cross-entropy.

    Args:
        heads: the heads of models in this process by role, for objectives that read hidden states. Teachers' may be added later.
            Without the student's an objective with a value head can be described, not trained.
    """
    objective, algorithm = _without_value(prepared, heads), prepared.config.algorithm
    if not has_value_head(prepared.config):
        return objective
    student = heads.get(STUDENT)
    hidden, device = (
        (1, "cpu") if student is None else (student.weight.shape[1], student.weight.device)
    )
    return Valued(
        objective=objective, head=ValueHead(hidden, device), gae_lambda=algorithm.gae_lambda
    )


def _without_value(prepared: Prepared, heads: Mapping[str, Head]) -> Objective:
    config, algorithm = prepared.config, prepared.config.algorithm
    if not config.on_policy:
        return CrossEntropy()
    # A vocabulary smaller than k is listed whole.
    top_k = min(algorithm.teacher_top_k, prepared.rendered.vocabulary)
    estimator = kl_estimator(config)
    if estimator == "sampled":
        return PolicyGradient(
            loss_fn=algorithm.loss_fn,
            kl_penalty_coef=algorithm.kl_penalty_coef,
            reward_coef=algorithm.reward_coef,
            kl_clamp=algorithm.kl_clamp,
            clip_ratio_low=algorithm.clip_ratio_low,
            clip_ratio_high=algorithm.clip_ratio_high,
            ratio_cap=algorithm.ratio_cap,
            temperature=config.rollout.temperature,
            kl_discount=algorithm.kl_discount,
            baseline=_baseline(config, heads, top_k),
        )
    rewarded = RewardTerm(
        reward_coef=algorithm.reward_coef,
        loss_fn=algorithm.loss_fn,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        ratio_cap=algorithm.ratio_cap,
    )
    if estimator == "exact":
        return ExactDivergence(
            heads=heads,
            divergence=algorithm.divergence,
            kl_penalty_coef=algorithm.kl_penalty_coef,
            rewarded=rewarded,
            temperature=config.rollout.temperature,
        )
    assert algorithm.divergence != "jsd", "refused with the config"
    return TopKDivergence(
        top_k=top_k,
        divergence=algorithm.divergence,
        kl_penalty_coef=algorithm.kl_penalty_coef,
        kl_clamp=algorithm.kl_clamp,
        ratio_cap=algorithm.ratio_cap,
        rewarded=rewarded,
        temperature=config.rollout.temperature,
    )


def _baseline(config: Config, heads: Mapping[str, Head], top_k: int) -> KlBaseline | None:
    if config.algorithm.kl_baseline == "none":
        return None
    return KlBaseline(heads=heads, top_k=0 if reads_hidden_states(config) else top_k)
