"""What can be told of a run from its folder, by whoever did not start it."""

from __future__ import annotations

import fcntl
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rnow.disk.files import read_json_object
from rnow.disk.folder import LOCK, MANIFEST, RunFolder
from rnow.disk.sinks import read_rows
from rnow.display.history import StepHistory, followed_metric

State = Literal["running", "elsewhere", "stopped", "finished"]
_PACE_ROWS = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as it is now.

    Attributes:
        state: ``elsewhere``: another machine worked on it last, and whether it still does cannot be seen from here.
        step: the last finished step, 0 before the first.
        steps: of the whole run, None where nothing says so.
        teacher_kl, reward: of the last step that has them.
        loss: of the last step, where the run learns from rows.
        seconds_left: estimated for a run that is running; NaN otherwise, and before its first step.
        pid: of its process, while it is running.
        stopping: that was asked to stop, and saves.
        host: where it was started last.
        changed: when something was last recorded, as ``time.time()``.
    """

    name: str
    folder: RunFolder
    state: State
    step: int
    steps: int | None
    teacher_kl: float | None
    loss: float | None
    reward: float | None
    seconds_left: float
    pid: int | None
    stopping: bool
    host: str | None
    changed: float

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        left = self.seconds_left
        return {
            "name": self.name,
            "folder": str(self.folder.path),
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "teacher_kl": self.teacher_kl,
            "loss": self.loss,
            "reward": self.reward,
            "seconds_left": left if math.isfinite(left) else None,
            "pid": self.pid,
            "stopping": self.stopping,
            "host": self.host,
            "changed": self.changed,
        }


def is_run(folder: RunFolder) -> bool:
    """Whether a run was begun in a folder."""
    begun = (folder.facts, folder.process, folder.checkpoints, folder.transcripts)
    return any(path.exists() for path in begun)


def find_runs(place: Path) -> list[RunFolder]:
    """The runs in a folder of runs, by name."""
    if not place.is_dir():
        return []
    folders = (RunFolder(path) for path in sorted(place.glob("[!.]*")) if path.is_dir())
    return [folder for folder in folders if is_run(folder)]


def read_state(folder: RunFolder) -> RunState:
    """Look at a run. Files that are missing or cut say nothing; none is an error."""
    process, summary = read_json_object(folder.process), read_json_object(folder.summary)
    rows = read_rows(folder.metrics)
    step = rows[-1]["step"] if rows else 0
    steps = process.get("steps")
    steps = steps if isinstance(steps, int) else None
    pid, host = process.get("pid"), process.get("host")
    running = isinstance(pid, int) and host == socket.gethostname() and _holds(pid, folder)
    done = summary.get("steps")
    if running:
        state: State = "running"
    elif isinstance(done, int) and done >= step:
        state, steps = "finished", done
    else:
        state = "stopped" if host in (None, socket.gethostname()) else "elsewhere"
    return RunState(
        name=folder.path.name,
        folder=folder,
        state=state,
        step=step,
        steps=steps,
        teacher_kl=_last(rows, "teacher_kl"),
        loss=_last(rows, "loss") if rows and followed_metric(rows[-1]) == "loss" else None,
        reward=_last(rows, "reward/mean"),
        seconds_left=_seconds_left(rows, steps) if running else math.nan,
        pid=pid if running else None,
        stopping=running and process.get("stopping") is True,
        host=host if isinstance(host, str) else None,
        changed=_changed(folder),
    )


def start_of(folder: RunFolder) -> tuple[str | None, str | None]:
    """What a run was told to start from: its ``model.path`` and its ``model.adapter``, as they were written."""
    config = read_json_object(folder.facts).get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return None, None
    path, adapter = model.get("path"), model.get("adapter")
    return path if isinstance(path, str) else None, adapter if isinstance(adapter, str) else None


def run_name(folder: RunFolder) -> str:
    """The name that a run was given, which those have in common that ``--fresh`` began beside each other."""
    name = read_json_object(folder.facts).get("name")
    return name if isinstance(name, str) else folder.path.name


def spare_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints of a run besides the newest, oldest first; none where that one is not whole, by the sizes in its manifest."""
    *older, newest = sorted(folder.checkpoints.glob("step-*")) or [folder.checkpoints]
    files = read_json_object(newest / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        return []
    for name, entry in files.items():
        try:
            if not isinstance(entry, dict) or (newest / name).stat().st_size != entry.get("size"):
                return []
        except OSError:
            return []
    return older


def _holds(pid: int, folder: RunFolder) -> bool:
    """Whether a process has the folder's lock open: a number alone may be another program's by now."""
    path = folder.path / LOCK
    try:
        lock = path.stat()
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_is_same(entry, lock) for entry in entries)
    except PermissionError:
        return _is_held(path)
    except OSError:
        return False


def _is_held(lock: Path) -> bool:
    """Whether anybody holds it. Only where its process may not be looked into, being of another user: asking takes the lock for a
    moment, in which a run that begins would be refused."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or not ours to read
        return True
    return False


def _is_same(entry: os.DirEntry[str], known: os.stat_result) -> bool:
    try:
        return os.path.samestat(entry.stat(), known)
    except OSError:  # closed meanwhile
        return False


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    found = (row[name] for row in reversed(rows) if isinstance(row.get(name), int | float))
    return next(found, None)


def _seconds_left(rows: Sequence[dict[str, Any]], steps: int | None) -> float:
    if steps is None:
        return math.nan
    history = StepHistory(lambda: math.nan)
    for row in rows[-_PACE_ROWS:]:
        history.add(row["step"], steps, {key: row[key] for key in row if row[key] is not None})
    return history.seconds_left()


def _changed(folder: RunFolder) -> float:
    times = [0.0]
    for path in (folder.metrics, folder.process, folder.summary, folder.path):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)
