"""Where the numbers of a run go: its folder, and whatever else is told them.

The numbers of a step never stop a run: what cannot be written is reported once, through ``warn``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rnow.disk.files import json_line, replace_file, unused
from rnow.text.redact import Redactor

Warn = Callable[[str], None]
Row = dict[str, Any]


class Sink(Protocol):
    """Receives the numbers of each step and each evaluation."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one step."""
        ...

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one evaluation after ``step`` steps."""
        ...

    def forget_from(self, step: int) -> None:
        """The run is about to write this step and the later ones: what an earlier start logged of them goes. Called once,
        before anything is logged, with 1 where a run begins; of the run's own files last, so that others find in them what
        there was."""
        ...

    def close(self, patience: float) -> None:
        """The run ends; what is not sent within ``patience`` seconds is lost."""
        ...


class JsonlSink:
    """Appends one JSON object per step to one file, ``{"step": 1, "teacher_kl": 0.41, ...}``, and one per evaluation to
    another, ``{"name": "before", "step": 0, "settings": "1f0c...", "pass@1": 0.5, ...}``; NaN and infinity as null.

    Args:
        metrics, evaluations: the files; their folder must exist.
        settings: kept with each evaluation: those with the same one can be compared (``plan.changes.measurement``).
        warn: called once when the metrics cannot be written, and once more when they can again.
        redact: takes the secrets out of the names of metrics and evaluations.
    """

    def __init__(
        self,
        metrics: Path,
        evaluations: Path,
        *,
        warn: Warn,
        settings: str = "",
        redact: Redactor | None = None,
    ) -> None:
        self._metrics = metrics
        self._evaluations = evaluations
        self._warn = warn
        self._settings = settings
        self._redact = redact or Redactor()
        self._failing = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.log``. A full disk loses the line, not the run."""
        line = json_line(self._redact.data({"step": step, **metrics}, keys=True))
        try:
            _append_whole(self._metrics, line)
        except OSError as error:
            if not self._failing:
                self._warn(f"metrics are not being written to {self._metrics}: {error.strerror}")
            self._failing = True
            return
        if self._failing:
            self._warn(f"metrics are written to {self._metrics} again; some steps are missing")
            self._failing = False

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.evaluated``.

        Raises:
            OSError: the disk is full. An evaluation is minutes of work and cannot be made up later: the run ends here, and
                the next start measures it again.
        """
        settings = {"settings": self._settings} if self._settings else {}
        row = self._redact.data({"name": name, "step": step, **metrics}, keys=True)
        with self._evaluations.open("ab") as file:
            file.write(json_line(row | settings))

    def forget_from(self, step: int) -> None:
        """See ``Sink.forget_from``. A file is replaced in one piece; one with lines that cannot be read is kept aside."""
        for path in (self._metrics, self._evaluations):
            self._keep_before(path, step)

    def _keep_before(self, path: Path, step: int) -> None:
        lines = read_lines(path)
        kept = [line for line, row in lines if row is not None and row["step"] < step]
        # What a crash cut at the end was not finished; anything else was a line once.
        if any(row is None and line.endswith(b"\n") for line, row in lines):
            aside = unused(path.with_name(f"damaged-{path.name}"))
            path.rename(aside)
            self._warn(f"{path.name} has lines that cannot be read; as it was it is {aside.name}")
        if len(kept) < len(lines):
            replace_file(path, b"".join(kept))

    def close(self, patience: float) -> None:
        """Nothing is held open."""


def read_lines(path: Path) -> list[tuple[bytes, Row | None]]:
    """Every line of a file of ``JsonlSink`` with what it says; None for a line that is cut or says something else. Empty
    where there is no file."""
    # Not splitlines(): a name may hold U+2028, which JSON leaves as it is.
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    whole = [line + b"\n" for line in lines[:-1]]
    return [(line, _row(line)) for line in [*whole, *filter(None, lines[-1:])]]


def each_row(path: Path) -> Iterator[Row]:
    """The lines of a file of ``JsonlSink`` that can be read, oldest first, one at a time; none where there is no file."""
    if path.exists():
        with path.open("rb") as lines:
            yield from (row for line in lines if (row := _row(line)) is not None)


def read_rows(path: Path) -> list[Row]:
    """All of them."""
    return list(each_row(path))


def read_evaluations(path: Path) -> list[Row]:
    """The evaluations that ``JsonlSink`` wrote, oldest first."""
    return [row for row in read_rows(path) if "name" in row]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    texts = ("name", "settings")
    holds = all(
        isinstance(value, str) if key in texts else value is None or isinstance(value, int | float)
        for key, value in row.items()
    )
    return row if holds else None


def _append_whole(path: Path, line: bytes) -> None:
    """Append ``line`` or nothing: a write cut short by a full disk is taken back, so that no half line stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
