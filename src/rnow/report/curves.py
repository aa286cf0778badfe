"""The numbers of every step as curves, thinned to what a screen can show, and which of them are drawn together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rnow.report.text import safe

MOST_POINTS = 600
"""Of a curve. Where there are more steps than this, a point is the mean of 2, 4, 8 ... steps."""

DIGITS = 5
"""Significant digits of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The metrics of a run.

    Attributes:
        steps: of each point, the last step in it.
        width: steps that make a point.
        values: metric -> one value a point, None where no step of it has the metric as a finite number.
        sums, largest: metric -> over all steps.
        missing: metric -> steps that have it, but not as a finite number.
        count: steps there are.
    """

    steps: Sequence[int]
    width: int
    values: Mapping[str, Sequence[float | None]]
    sums: Mapping[str, float]
    largest: Mapping[str, float]
    missing: Mapping[str, int]
    count: int

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return self.steps[-1] if self.steps else 0

    def ends(self, name: str) -> tuple[float, float] | None:
        """Means over the first and the last tenth of the points that have a metric; None where none has it."""
        known = [value for value in self.values.get(name, ()) if value is not None]
        tenth = max(1, len(known) // 10)
        return (_mean(known[:tenth]), _mean(known[-tenth:])) if known else None


@dataclass(slots=True, kw_only=True)
class _Point:
    """Consecutive steps put together."""

    last: int
    steps: int = 1
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def join(self, later: _Point) -> _Point:
        self.last, self.steps = later.last, self.steps + later.steps
        for name, value in later.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + later.counts[name]
        return self


def read_curves(rows: Iterable[Mapping[str, Any]], most: int = MOST_POINTS) -> Curves:
    """Thin the rows of metrics.jsonl, which come one at a time: what is held does not grow with the steps."""
    points: list[_Point] = []
    width, count = 1, 0
    largest: dict[str, float] = {}
    missing: dict[str, int] = {}
    names: dict[str, None] = {}
    for row in rows:
        count += 1
        point = _Point(last=row["step"])
        for name, value in row.items():
            if name == "step":
                continue
            names[name] = None
            if not isinstance(value, int | float) or not math.isfinite(value):
                missing[name] = missing.get(name, 0) + 1
                continue
            point.sums[name], point.counts[name] = float(value), 1
            largest[name] = max(value, largest.get(name, value))
        if points and points[-1].steps < width:
            points[-1].join(point)
        else:
            points.append(point)
        if len(points) > most:
            points, width = list(_pairs(points)), 2 * width
    return Curves(
        steps=[point.last for point in points],
        width=width,
        values={name: [_value(point, name) for point in points] for name in names},
        sums={name: math.fsum(point.sums.get(name, 0.0) for point in points) for name in names},
        largest=largest,
        missing=missing,
        count=count,
    )


def _pairs(points: list[_Point]) -> Iterator[_Point]:
    for at in range(0, len(points) - 1, 2):
        yield points[at].join(points[at + 1])
    if len(points) % 2:
        yield points[-1]


def _value(point: _Point, name: str) -> float | None:
    return rounded(point.sums[name] / point.counts[name]) if name in point.sums else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def rounded(value: float) -> float:
    """To ``DIGITS`` significant digits."""
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What is drawn together: metrics by name, and those that begin with one of ``parts``, but for those in ``without``."""

    title: str
    unit: str = ""
    about: str = ""
    names: Sequence[str] = ()
    parts: Sequence[str] = ()
    without: Sequence[str] = ()

    def of(self, there: Iterable[str]) -> list[str]:
        """The metrics of this chart that a run has: those named first, in their order."""
        there = list(there)
        named = [name for name in self.names if name in there]
        more = [name for name in there if name.startswith(tuple(self.parts)) and name not in named]
        return named + [name for name in more if name not in self.without]


CHARTS = (
    Chart(
        title="KL to the teacher",
        unit="nats per token",
        about="How far the student is from its teacher on its own answers. It should fall.",
        names=("teacher_kl",),
        parts=("teacher_kl/",),
        without=("teacher_kl/k3",),
    ),
    Chart(title="Loss", names=("loss",), parts=("loss/",)),
    Chart(
        title="Reward",
        names=("reward/mean",),
        parts=("reward/",),
        without=("reward/failure_fraction", "reward/equal_groups_fraction"),
    ),
    Chart(
        title="Entropy of the student",
        unit="nats per token",
        about="How open its next token is. Near 0 it always says the same.",
        names=("entropy",),
    ),
    Chart(
        title="Length of an answer",
        unit="tokens",
        names=("completions/mean_length",),
    ),
    Chart(
        title="How answers end",
        unit="share of answers",
        about="By themselves, or cut by a limit.",
        names=(
            "completions/eos_fraction",
            "completions/truncated_fraction",
            "rollouts/failed_fraction",
            "rollouts/last_tool_fraction",
            "rollouts/max_turns_fraction",
        ),
    ),
    Chart(
        title="Turns and tool calls",
        unit="per rollout",
        names=("rollouts/turns", "tools/calls_per_rollout"),
        parts=("tools/calls_per_rollout/",),
    ),
    Chart(
        title="What failed",
        unit="share",
        names=("tools/failure_fraction", "reward/failure_fraction"),
        parts=("reward_failures/",),
    ),
    Chart(
        title="Groups whose rewards are all equal",
        unit="share of groups",
        about="Nothing is learned from rewards there.",
        names=("reward/equal_groups_fraction",),
    ),
    Chart(title="Time of a step", unit="seconds", names=("time/step",), parts=("time/",)),
    Chart(
        title="Speed",
        unit="tokens per second",
        names=("throughput/completion_tokens_per_s",),
    ),
    Chart(title="Gradient norm", about="Before it is clipped.", names=("grad_norm",)),
    Chart(
        title="Clipped",
        unit="share of tokens",
        names=("clip_fraction", "kl_clamp_fraction"),
    ),
    Chart(
        title="Sampler against trainer",
        unit="nats per token",
        about="Both are the student: far from 0, they do not compute the same.",
        names=("sampler_trainer_kl",),
    ),
    Chart(title="Memory", unit="GB, most so far", names=("memory/peak_gb",)),
)


def build_charts(curves: Curves) -> list[dict[str, object]]:
    """The charts of a run, JSON-ready. One in which nothing ever was but 0 is left out: its metrics are among the others."""
    found: list[dict[str, object]] = []
    for chart in CHARTS:
        names = _distinct(chart.of(curves.values), curves)
        if not any(any(curves.values[name]) for name in names):
            continue
        series = [{"label": safe(name), "values": curves.values[name]} for name in names]
        found.append(
            {"title": chart.title, "unit": chart.unit, "about": chart.about, "series": series}
        )
    return found


def other_metrics(curves: Curves, charts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The metrics that no chart draws, and that change."""
    drawn = [series["values"] for chart in charts for series in chart["series"]]
    return {
        safe(name): values
        for name, values in curves.values.items()
        if values not in drawn and any(a != b for a, b in pairwise(values))
    }


def _distinct(names: list[str], curves: Curves) -> list[str]:
    """Without the part that is the whole, where there is one part only."""
    if len(names) == 2 and curves.values[names[0]] == curves.values[names[1]]:
        return names[:1]
    return [name for name in names if any(value is not None for value in curves.values[name])]
