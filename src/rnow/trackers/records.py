"""What a tracker is told of a run: its numbers, and at every start all of them that are in its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Row, read_evaluations, read_rows

_NO_NUMBERS = frozenset({"step", "name", "settings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The numbers of one step, or of one evaluation after so many steps, by name; finite ones only."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a run's files hold when it begins or continues.

    Attributes:
        records: in the order in which the run recorded them.
        taken_back: later steps had been recorded, and the run is about to write them anew.
    """

    records: Sequence[Record]
    taken_back: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run as a tracker is told of it; nothing in it is secret.

    Attributes:
        home: the project's folder.
        id: which run this is; the same at every start of it.
        project: the tracker's word for a place of many runs.
        name: what the run is called there.
        config: JSON-ready.
    """

    folder: RunFolder
    home: Path
    id: str
    project: str
    name: str
    config: Mapping[str, object]

    @property
    def report(self) -> Path | None:
        """The run's report.html, where it has one."""
        return self.folder.report if self.folder.report.is_file() else None


class Tracker(Protocol):
    """One tracker. All calls come from one thread, in this order; what any of them raises ends the tracking, not the run.

    Attributes:
        title: its name, for people.
        extra: of pyproject.toml, with which it is installed.
    """

    title: str
    extra: str

    def begin(self, history: History) -> None:
        """Show exactly this: send what is lacking, and take back what an earlier start sent beyond it."""
        ...

    def send(self, record: Record) -> None:
        """Show one more record."""
        ...

    def finish(self) -> None:
        """The run has ended, or was stopped; nothing may be left unsent."""
        ...


def step_record(step: int, metrics: Mapping[str, float]) -> Record:
    """The metrics of one step."""
    return Record(step=step, values=_numbers(metrics))


def evaluation_record(name: str, step: int, metrics: Mapping[str, float]) -> Record:
    """Those of an evaluation: ``eval/<name>/<metric>``."""
    named = {f"eval/{name}/{key}": value for key, value in _numbers(metrics).items()}
    return Record(step=step, values=named)


def read_history(folder: RunFolder, *, before: float) -> History:
    """What a run's files say of the steps before ``before``."""
    found = [step_record(row["step"], row) for row in read_rows(folder.metrics)]
    found += [
        evaluation_record(row["name"], row["step"], row)
        for row in read_evaluations(folder.evaluations)
    ]
    kept = [record for record in found if record.step < before]
    # Stable: an evaluation after so many steps comes after the last of them.
    kept.sort(key=lambda record: record.step)
    return History(records=kept, taken_back=len(kept) < len(found))


def _numbers(row: Mapping[str, float] | Row) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if key not in _NO_NUMBERS and value is not None and math.isfinite(value)
    }
