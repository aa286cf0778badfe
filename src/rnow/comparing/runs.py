"""What several runs did, side by side: courses of their metrics, evaluations, and where their settings differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Literal

from rnow.comparing.evaluations import Measured, read_measured
from rnow.config.overrides import dotted_values
from rnow.disk.files import read_json_object
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Row, read_rows

SHOWN = (
    "teacher_kl", "teacher_kl/*", "loss", "loss/*", "reward/mean", "entropy", "completions/mean_length",
    "completions/truncated_fraction", "time/step", "throughput/completion_tokens_per_s", "memory/peak_gb",
)  # fmt: skip
"""Metrics that are shown where nobody asks for others, in this order."""

_BETTER: Mapping[str, Literal["low", "high"]] = {
    "*fail*": "low",
    "reward/*": "high",
    "teacher_kl*": "low",
    "loss*": "low",
    "completions/truncated_fraction": "low",
    "throughput/*": "high",
    "time/*": "low",
    "memory/*": "low",
}
"""Which end of a metric is the better one, by the first pattern that fits; the others have none."""

_OF_NO_RUN = ("model.name", "wandb_name", "config_hash")
"""Keys of the config that differ by themselves."""

_CONTENTS = {
    "student_weights": "the student's weights",
    "start_adapter": "the adapter it starts from",
    "teacher_weights": "the teacher's weights",
    "tokenizer_hash": "the tokenizer",
    "dataset_hash": "the training data",
    "rewards_hash": "rewards.py",
    "tools_hash": "tools.py",
}
"""Facts of a run that stand in no config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One metric of one run.

    Attributes:
        steps, values: of the steps that have a number.
        first, last: means over the first and last tenth of the steps, at least one, as in summary.json.
        best: the step of the best value and that value, where one end is the better one.
    """

    steps: Sequence[int]
    values: Sequence[float]
    first: float
    last: float
    best: tuple[int, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One run as it is in its folder.

    Attributes:
        steps: the last one that is recorded.
        rows: metrics.jsonl.
        settings: its config, dotted keys -> values.
        contents: what else shapes it, by what it is -> a hash.
        measured: its evaluations.
    """

    label: str
    folder: Path
    steps: int
    rows: Sequence[Row]
    settings: Mapping[str, object]
    contents: Mapping[str, object]
    measured: Mapping[str, Measured]


def read_run(folder: RunFolder, label: str | None = None) -> Compared:
    """A run from its folder. What is missing there, or cut, is left out."""
    rows, facts = read_rows(folder.metrics), read_json_object(folder.facts)
    config = facts.get("config")
    return Compared(
        label=label or folder.path.name,
        folder=folder.path,
        steps=rows[-1]["step"] if rows else 0,
        rows=rows,
        settings=dict(dotted_values(config)) if isinstance(config, dict) else {},
        contents={what: facts[name] for name, what in _CONTENTS.items() if name in facts},
        measured=read_measured(folder),
    )


def read_runs(folders: Sequence[RunFolder]) -> list[Compared]:
    """Runs by their names; two of one name by their paths."""
    names = [folder.path.name for folder in folders]
    return [
        read_run(folder, str(folder.path) if names.count(folder.path.name) > 1 else None)
        for folder in folders
    ]


def course(rows: Sequence[Row], name: str) -> Course | None:
    """One metric of a run; None where no step has it."""
    numbers = ((row["step"], row.get(name)) for row in rows)
    found = [(n, value) for n, value in numbers if value is not None and math.isfinite(value)]
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    tenth, better = max(1, len(values) // 10), better_end(name)
    end: Callable[[list[float]], float] = min if better == "low" else max
    best = end(list(values))
    return Course(
        steps=steps,
        values=values,
        first=fmean(values[:tenth]),
        last=fmean(values[-tenth:]),
        best=(steps[values.index(best)], best) if better else None,
    )


def better_end(name: str) -> Literal["low", "high"] | None:
    """Whether less or more of a metric is better; None where neither is."""
    return next((end for pattern, end in _BETTER.items() if fnmatchcase(name, pattern)), None)


def chosen_metrics(runs: Sequence[Compared], patterns: Sequence[str] = SHOWN) -> list[str]:
    """The metrics of any of the runs that fit a pattern, in the order of the patterns."""
    there = sorted({name for run in runs for row in run.rows for name in row} - {"step"})
    known = [name for name in there if any(course(run.rows, name) for run in runs)]
    fitting = (name for pattern in patterns for name in known if fnmatchcase(name, pattern))
    return list(dict.fromkeys(fitting))


def differing_settings(runs: Sequence[Compared]) -> dict[str, list[object]]:
    """Key -> its value in each run, for every key of the config that is not the same in all; None where it is not set."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _OF_NO_RUN)
    found = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if not _all_equal(values)}


def differing_contents(runs: Sequence[Compared]) -> list[str]:
    """What is another file, or another model, between the runs, though the config may not show it."""
    known = [what for what in _CONTENTS.values() if all(what in run.contents for run in runs)]
    return [what for what in known if not _all_equal([run.contents[what] for run in runs])]


def thinned(found: Course, *, end: int, count: int) -> list[float]:
    """A course as ``count`` means over equal parts of the steps up to ``end``; NaN where a part has none."""
    parts: list[list[float]] = [[] for _ in range(count)]
    for step, value in zip(found.steps, found.values, strict=True):
        parts[min(count - 1, max(0, step - 1) * count // max(1, end))].append(value)
    return [fmean(part) if part else math.nan for part in parts]


def _all_equal(values: Sequence[object]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values}) == 1
