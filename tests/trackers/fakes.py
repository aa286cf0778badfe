"""A run folder with numbers in it, and what trackers are told of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rnow.disk.folder import RunFolder
from rnow.disk.sinks import JsonlSink, Sink
from rnow.trackers.records import Tracked


def tracked(folder: Path, **changes: Any) -> Tracked:
    """The run in a folder, in the project around it."""
    values: dict[str, Any] = {
        "folder": RunFolder(folder),
        "home": folder.parent,
        "id": "0123456789abcdef",
        "project": "project",
        "name": "run",
        "config": {
            "seed": 0,
            "trainer": {"learning_rate": 1e-4},
            "data": {"train_file": [{"path": "a"}]},
        },
    }
    return Tracked(**values | changes)


def files_of(folder: Path) -> JsonlSink:
    """What writes the run's own files."""
    run = RunFolder(folder)
    return JsonlSink(run.metrics, run.evaluations, warn=pytest.fail)


def record(*sinks: Sink, steps: range, offset: float = 0.0) -> None:
    """A few numbers of each step, and an evaluation after every second one."""
    for step in steps:
        metrics = {
            "teacher_kl": 1 / (step + offset),
            "teacher_kl/math": 0.1 * step + offset,
            "reward/mean": float(step),
            "loss": float("nan"),
        }
        for sink in sinks:
            sink.log(step, metrics)
        if step % 2 == 0:
            for sink in sinks:
                sink.evaluated("often", step, {"pass@1": step / 8 + offset, "teacher_kl": 0.3})


def not_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the import of these packages fail, whatever of them was imported already."""
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] in names:
            monkeypatch.delitem(sys.modules, loaded)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
