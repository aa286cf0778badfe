"""What a run shows while it works: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from rich.console import Console

from rnow.display.downloads import Download
from rnow.display.live_table import LiveTable
from rnow.display.plain_lines import PlainLines

_log = logging.getLogger("rnow")


class Display(Protocol):
    """What the loop tells its audience. Every text may hold anything: displays make it safe to print."""

    def start(self, plan_lines: Sequence[str]) -> None:
        """The run begins. Lines of the form ``label: value`` are set as two columns."""
        ...

    def stage(self, name: str) -> None:
        """What is happening now, e.g. ``rollout`` or ``loading the teacher``."""
        ...

    def download(self, download: Download) -> None:
        """A model comes from the hub; told a few times a second, and once more when it is there."""
        ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Step ``step`` (1-based) of ``total`` is done; ``metrics`` are named as in metrics.jsonl."""
        ...

    def note(self, text: str) -> None:
        """One line the user should know."""
        ...

    def warn(self, text: str) -> None:
        """The same, marked as a warning."""
        ...

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        """Results of one evaluation, e.g. ``before`` with ``{"pass@1": 0.52, "teacher_kl": 0.4}``."""
        ...

    def saved(self, step: int, folder: str) -> None:
        """The state after so many steps is committed to a checkpoint."""
        ...

    def finish(self, lines: Sequence[str]) -> None:
        """The run is done. Lines that begin with four spaces are code to copy."""
        ...

    def close(self) -> None:
        """Give the terminal back. May be called at any time, and more than once."""
        ...


class QuietDisplay:
    """Shows nothing; for use from Python. Warnings are notes here, for those who override ``note`` to collect both."""

    def start(self, plan_lines: Sequence[str]) -> None: ...

    def stage(self, name: str) -> None: ...

    def download(self, download: Download) -> None: ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def evaluation(self, name: str, results: Mapping[str, float]) -> None: ...

    def saved(self, step: int, folder: str) -> None: ...

    def finish(self, lines: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class RedactingDisplay:
    """Another display, with the secrets taken out of all that it is told."""

    def __init__(self, display: Display, redact: Callable[[str], str]) -> None:
        self._display = display
        self._redact = redact

    def start(self, plan_lines: Sequence[str]) -> None:
        self._display.start([self._redact(line) for line in plan_lines])

    def stage(self, name: str) -> None:
        self._display.stage(self._redact(name))

    def download(self, download: Download) -> None:
        self._display.download(replace(download, name=self._redact(download.name)))

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._display.step(step, total, metrics)

    def note(self, text: str) -> None:
        self._display.note(self._redact(text))

    def warn(self, text: str) -> None:
        self._display.warn(self._redact(text))

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        self._display.evaluation(name, results)

    def saved(self, step: int, folder: str) -> None:
        self._display.saved(step, self._redact(folder))

    def finish(self, lines: Sequence[str]) -> None:
        self._display.finish([self._redact(line) for line in lines])

    def close(self) -> None:
        self._display.close()


class Both:
    """Two displays that are told the same."""

    def __init__(self, first: Display, second: Display) -> None:
        self._each = (first, second)

    def start(self, plan_lines: Sequence[str]) -> None:
        for display in self._each:
            display.start(plan_lines)

    def stage(self, name: str) -> None:
        for display in self._each:
            display.stage(name)

    def download(self, download: Download) -> None:
        for display in self._each:
            display.download(download)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        for display in self._each:
            display.step(step, total, metrics)

    def note(self, text: str) -> None:
        for display in self._each:
            display.note(text)

    def warn(self, text: str) -> None:
        for display in self._each:
            display.warn(text)

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        for display in self._each:
            display.evaluation(name, results)

    def saved(self, step: int, folder: str) -> None:
        for display in self._each:
            display.saved(step, folder)

    def finish(self, lines: Sequence[str]) -> None:
        for display in self._each:
            display.finish(lines)

    def close(self) -> None:
        for display in self._each:
            display.close()


class Harmless:
    """A display of which no fault reaches the loop: what it cannot show is left out, and the log says so once."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._failed = False

    def start(self, plan_lines: Sequence[str]) -> None:
        self._try(lambda: self._display.start(plan_lines))

    def stage(self, name: str) -> None:
        self._try(lambda: self._display.stage(name))

    def download(self, download: Download) -> None:
        self._try(lambda: self._display.download(download))

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._display.step(step, total, metrics))

    def note(self, text: str) -> None:
        self._try(lambda: self._display.note(text))

    def warn(self, text: str) -> None:
        self._try(lambda: self._display.warn(text))

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        self._try(lambda: self._display.evaluation(name, results))

    def saved(self, step: int, folder: str) -> None:
        self._try(lambda: self._display.saved(step, folder))

    def finish(self, lines: Sequence[str]) -> None:
        self._try(lambda: self._display.finish(lines))

    def close(self) -> None:
        self._try(lambda: self._display.close())

    def _try(self, show: Callable[[], None]) -> None:
        try:
            show()
        except (Exception, SystemExit):  # rich ends the program where a pipe is closed
            if not self._failed:
                _log.warning("the display failed; the run goes on", exc_info=True)
            self._failed = True


def build_display(console: Console) -> Display:
    """The display of ``rnow run``: a live table where the console can redraw itself, plain lines with the time otherwise."""
    if wants_live(console, os.environ):
        return Harmless(LiveTable(console))
    return Harmless(PlainLines(console, stamp=lambda: time.strftime("%Y-%m-%d %H:%M:%S  ")))


def wants_live(console: Console, environment: Mapping[str, str]) -> bool:
    """Whether a table may be redrawn in place: a real terminal, and no log that somebody will read later. NO_COLOR is about
    colours, which the console leaves out."""
    if not console.is_terminal or console.is_dumb_terminal:
        return False
    return not environment.get("CI")
