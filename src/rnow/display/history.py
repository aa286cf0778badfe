"""What the displays remember of the steps so far: values for the trend, pace for the ETA."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

_KEPT_STEPS = 2048
_PACE_STEPS = 20
_MAIN_STAGES = ("rollout", "teacher", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step as displayed. ``number`` is 1-based."""

    number: int
    metrics: Mapping[str, float]


def followed_metric(metrics: Collection[str]) -> str:
    """The metric that says how a run is getting on: its loss, where it learns from rows and nobody judges answers."""
    answered = "teacher_kl" in metrics or "completions/mean_length" in metrics
    return "teacher_kl" if answered or "loss" not in metrics else "loss"


def stage_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of rollout, teacher and update, and of everything else as ``other``; empty when nothing was timed.

    ``time/step``, when there, is the whole step; otherwise the step is the sum of all ``time/*``.
    """
    timed = {
        name.removeprefix("time/"): value
        for name, value in metrics.items()
        if name.startswith("time/") and math.isfinite(value)
    }
    if not timed:
        return {}
    whole = timed.pop("step", None)
    if whole is None:
        whole = sum(timed.values())
    main = {name: timed[name] for name in _MAIN_STAGES if name in timed}
    return main | {"other": max(0.0, whole - sum(main.values()))}


class StepHistory:
    """The steps of this process, oldest first, bounded in memory.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque([clock()], maxlen=_PACE_STEPS + 1)
        self.rows: deque[StepRow] = deque(maxlen=_KEPT_STEPS)
        self.total = 0

    def restart_clock(self) -> None:
        """Forget the time up to now: what went before (loading, evaluating) says nothing of the steps' pace."""
        if not self.rows:
            self._times.clear()
            self._times.append(self._clock())

    def add(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Record a finished step."""
        self._times.append(self._clock())
        self.rows.append(StepRow(number=step, metrics=dict(metrics)))
        self.total = total

    @property
    def done(self) -> int:
        """The number of the newest finished step, 0 before the first."""
        return self.rows[-1].number if self.rows else 0

    def seconds_per_step(self) -> float:
        """Mean seconds of the newest steps; NaN before the first.

        From ``time/step`` where the steps have it: evaluations and checkpoints between steps do not count, nor does the
        first step of the process, which warms up, once there is another.
        """
        recent = list(self.rows)[1:][-_PACE_STEPS:] or list(self.rows)
        timed = [row.metrics.get("time/step", math.nan) for row in recent]
        if timed and all(map(math.isfinite, timed)):
            return sum(timed) / len(timed)
        if len(self._times) < 2:
            return math.nan
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)

    def seconds_left(self) -> float:
        """Estimated wall seconds to the last step; NaN before the first."""
        return self.seconds_per_step() * max(0, self.total - self.done)

    def values(self, name: str, *, up_to: int) -> list[float]:
        """One metric over the steps up to number ``up_to``, NaN where a step lacks it."""
        return [row.metrics.get(name, math.nan) for row in self.rows if row.number <= up_to]

    def thinned(self, count: int) -> list[StepRow]:
        """At most ``count`` rows for a table: round step numbers about two seconds apart, and always the newest."""
        if not self.rows:
            return []
        pace = self.seconds_per_step()
        stride = 1
        if math.isfinite(pace) and pace > 0:
            stride = _round_up(2.0 / pace)
        newest = self.rows[-1]
        older = [row for row in self.rows if row.number % stride == 0 and row is not newest]
        return [*older[len(older) - min(len(older), count - 1) :], newest]


def _round_up(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below ``value``."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= value:
                return digit * scale
        scale *= 10
