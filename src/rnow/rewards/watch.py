"""Rewards that fail: told the first time, and the end of a run that would learn from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rnow.errors import SAME_COMMAND, RnowError
from rnow.types import RewardResult

MAX_UNREWARDED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How often one reward failed; ``error`` is the first of its errors, with the line of the user's file, ``traceback`` the first
    where it raised."""

    name: str
    error: str
    count: int
    rollouts: int
    traceback: str | None = None

    @property
    def everywhere(self) -> bool:
        """Whether it failed on every rollout that it was to judge."""
        return self.count == self.rollouts

    def line(self) -> str:
        """``reward "style" fails: KeyError: 'answer' (rewards.py:12), in 3 of 8 rollouts``."""
        where = f"in {self.count} of {self.rollouts} rollouts"
        return f'reward "{self.name}" fails: {self.error}, {where}'

    def lines(self) -> list[str]:
        """The same, and the traceback below it."""
        return [self.line(), *(f"  {line}" for line in (self.traceback or "").splitlines())]


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
            traceback=next((r.tracebacks[name] for r in judged if name in r.tracebacks), None),
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
        self._worked: set[str] = set()
        self._failing: Counter[str] = Counter()

    def look(self, where: str, rewards: Mapping[str, RewardResult]) -> list[Failure]:
        """Tell of rewards that fail for the first time. ``where``: ``of step 3``."""
        found = failures(rewards.values())
        for failure in found:
            if failure.name not in self._told:
                self._told.add(failure.name)
                self._warn(f"{failure.line()} {where}")
        for result in rewards.values():
            self._worked |= result.breakdown.keys() - result.errors.keys()
        return found

    def step(self, step: int, rewards: Mapping[str, RewardResult]) -> None:
        """Look at the rewards of a step, before it is trained on.

        Raises:
            RnowError: the student is to learn from the rewards, and one of them failed on every rollout that it was to judge: at
                once where it has not worked since the start, else at the third step in a row. Its zeros would be learned from.
        """
        found = self.look(f"of step {step}", rewards)
        dead = [failure for failure in found if failure.everywhere]
        called = {name for result in rewards.values() for name in result.breakdown}
        for name in called - {failure.name for failure in dead}:
            del self._failing[name]
        self._failing.update(failure.name for failure in dead)
        ended = [
            failure
            for failure in dead
            if failure.name not in self._worked or self._failing[failure.name] >= MAX_UNREWARDED
        ]
        if not (self._teaching and ended):
            return
        all_failed = all(not result.worked for result in rewards.values() if result.breakdown)
        raise self._ended(step, dead if all_failed else ended, all_failed=all_failed)

    def _ended(self, step: int, failed: list[Failure], *, all_failed: bool) -> RnowError:
        count = max(self._failing[failure.name] for failure in failed)
        when = f"step {step}" if count == 1 else f"{count} steps in a row"
        names = " and ".join(f'"{failure.name}"' for failure in failed)
        what = (
            "every reward of every rollout failed: there is nothing to learn from"
            if all_failed
            else f"the reward {names} failed on every rollout: its zeros would be learned from"
        )
        return RnowError(
            f"in {when} {what}",
            title="Rewards fail",
            details=[line for failure in failed for line in failure.lines()],
            where="rewards.py",
            fix=f"mend it and try it with `rnow test`, then {SAME_COMMAND}: it continues from there",
        )
