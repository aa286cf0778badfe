"""Running the user's reward functions on rollouts."""

from __future__ import annotations

from rnow.rewards.runner import RewardRunner
from rnow.rewards.score import score_rewards

__all__ = ["RewardRunner", "score_rewards"]
