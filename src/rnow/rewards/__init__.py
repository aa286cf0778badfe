"""Running the user's reward functions on rollouts."""

from __future__ import annotations

from rnow.rewards.score import RewardRunner, score_rewards

__all__ = ["RewardRunner", "score_rewards"]
