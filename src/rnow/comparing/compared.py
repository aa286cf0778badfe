"""The comparison of several runs as one record, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rnow.comparing.evaluations import Measured, difference
from rnow.comparing.runs import (
    SHOWN,
    Compared,
    Course,
    chosen_metrics,
    course,
    differing_contents,
    differing_settings,
)
from rnow.training.intervals import HOW, Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs side by side. Every sequence of values has one for each run, in their order.

    Attributes:
        courses: metric -> its course; None in a run that does not have it.
        settings: differing key -> its values.
        contents: what else differs.
        measured: evaluation and metric -> what was measured.
    """

    runs: Sequence[Compared]
    courses: Mapping[str, Sequence[Course | None]]
    settings: Mapping[str, Sequence[object]]
    contents: Sequence[str]
    measured: Mapping[str, Sequence[Measured | None]]

    @property
    def end(self) -> int:
        """The last step of the longest run."""
        return max((run.steps for run in self.runs), default=0)

    def differences(self, name: str) -> list[Interval | None]:
        """What was measured of each run but the first, minus the first's, prompt by prompt."""
        first, *others = self.measured[name]
        return [first and other and difference(first, other) for other in others]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "runs": [
                {"name": run.label, "folder": str(run.folder.resolve()), "steps": run.steps}
                for run in self.runs
            ],
            "metrics": {
                name: [None if one is None else _course(one) for one in found]
                for name, found in self.courses.items()
            },
            "settings": dict(self.settings),
            "other_contents": list(self.contents),
            "intervals": HOW,
            "evaluations": {
                name: {
                    "runs": [None if one is None else _measured(one) for one in found],
                    "minus_first": [one and asdict(one) for one in self.differences(name)],
                }
                for name, found in self.measured.items()
            },
        }


def compare(runs: Sequence[Compared], patterns: Sequence[str] = SHOWN) -> Comparison:
    """
    Args:
        patterns: which metrics, as file names are matched: ``reward/*``.
    """
    names = dict.fromkeys(name for run in runs for name in run.measured)
    return Comparison(
        runs=runs,
        courses={
            name: [course(run.rows, name) for run in runs]
            for name in chosen_metrics(runs, patterns)
        },
        settings=differing_settings(runs),
        contents=differing_contents(runs),
        measured={name: [run.measured.get(name) for run in runs] for name in names},
    )


def _course(found: Course) -> dict[str, object]:
    best = found.best and {"step": found.best[0], "value": found.best[1]}
    values = {"first": found.first, "last": found.last, "best": best}
    return {**values, "steps": list(found.steps), "values": list(found.values)}


def _measured(found: Measured) -> dict[str, object]:
    interval = found.interval
    bounds = {} if interval is None else {"low": interval.low, "high": interval.high}
    return {"value": found.value, **bounds, "step": found.step}
