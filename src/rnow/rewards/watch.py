"""Rewards that fail: told the first time, and the end of a run that would learn from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rnow.errors import SAME_COMMAND, RnowError
from rnow.types import RewardResult

MAX_UNREWARDED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How often one reward failed; ``error`` is the first of its errors, with the line of the user's file."""

    name: str
    error: str
    count: int
    rollouts: int

    def line(self) -> str:
        """``reward "style" fails: KeyError: 'answer' (rewards.py:12), in 3 of 8 rollouts``."""
        where = f"in {self.count} of {self.rollouts} rollouts"
        return f'reward "{self.name}" fails: {self.error}, {where}'


def failures(results: Iterable[RewardResult]) -> list[Failure]:
    """The rewards that failed, by name. Rollouts that failed themselves were shown to no reward and are left out."""
    judged = [result for result in results if result.breakdown]
    names = sorted({name for result in judged for name in result.errors})
    return [
        Failure(
            name=name,
            error=next(result.errors[name] for result in judged if name in result.errors),
            count=sum(name in result.errors for result in judged),
            rollouts=sum(name in result.breakdown or name in result.errors for result in judged),
        )
        for name in names
    ]


class RewardWatch:
    """Looks at the rewards of each step and each evaluation of one start of a run.

    Args:
        warn: told of each reward that fails, once; ``reward_failures/<name>`` of the metrics tells the rest.
        teaching: the student learns from the rewards (``algorithm.reward_coef`` above 0).
    """

    def __init__(self, warn: Callable[[str], None], *, teaching: bool) -> None:
        self._warn = warn
        self._teaching = teaching
        self._told: set[str] = set()
        self._worked = False
        self._unrewarded = 0

    def look(self, where: str, rewards: Mapping[str, RewardResult]) -> list[Failure]:
        """Tell of rewards that fail for the first time. ``where``: ``of step 3``."""
        found = failures(rewards.values())
        for failure in found:
            if failure.name not in self._told:
                self._told.add(failure.name)
                self._warn(f"{failure.line()} {where}")
        self._worked |= any(result.breakdown and result.worked for result in rewards.values())
        return found

    def step(self, step: int, rewards: Mapping[str, RewardResult]) -> None:
        """Look at the rewards of a step, before it is trained on.

        Raises:
            RnowError: the student is to learn from the rewards, and every reward of every rollout failed: at once where none
                has worked since the start, else at the third step in a row.
        """
        found = self.look(f"of step {step}", rewards)
        judged = [result for result in rewards.values() if result.breakdown]
        if not judged or any(result.worked for result in judged):
            self._unrewarded = 0
            return
        self._unrewarded += 1
        if self._teaching and (not self._worked or self._unrewarded >= MAX_UNREWARDED):
            steps = (
                f"step {step}" if self._unrewarded == 1 else f"{self._unrewarded} steps in a row"
            )
            raise RnowError(
                f"in {steps} every reward of every rollout failed: there is nothing to learn from",
                title="Rewards fail",
                details=[failure.line() for failure in found],
                where="rewards.py",
                fix=f"mend it and try it with `rnow test`, then {SAME_COMMAND}: it continues from there",
            )
