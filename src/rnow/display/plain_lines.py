"""The display for logs, pipes and screen readers: one line per event, nothing redrawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from rnow.display.downloads import Download, DownloadLines
from rnow.display.history import StepHistory, followed_metric, stage_seconds
from rnow.display.tables import headline_text, result_table
from rnow.display.terminal import (
    escape_control,
    format_clock,
    format_number,
    format_rate,
    format_seconds,
)

STEP_STAGES = frozenset({"rollout", "reward", "teacher", "update", "sync", "batch", "other"})
"""Stages that come round every step: the step's own line reports them."""

_SECONDS_BETWEEN_LINES = 1.0


class PlainLines:
    """Prints the first and the last step, and those between at most about once per second.

    Args:
        stamp: what every line that tells of an event begins with, e.g. the time of day.
    """

    def __init__(
        self,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], str] = lambda: "",
    ) -> None:
        self._console = console
        self._clock = clock
        self._stamp = stamp
        self._history = StepHistory(clock)
        self._downloads = DownloadLines(clock)
        self._last_stage = ""
        self._last_line_at = -math.inf
        self._evaluations: dict[str, Mapping[str, float]] = {}
        self._pending = ""

    def start(self, plan_lines: Sequence[str]) -> None:
        for line in plan_lines:
            self._print(line)

    def stage(self, name: str) -> None:
        if name != self._last_stage and name not in STEP_STAGES:
            self._flush()
            self._tell(f"{name} ...")
        self._last_stage = name

    def download(self, download: Download) -> None:
        if self._downloads.due(download):
            self._tell(download.line())

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._history.add(step, total, metrics)
        self._pending = self._step_line(step, total, metrics)
        now = self._clock()
        if now - self._last_line_at >= _SECONDS_BETWEEN_LINES or step >= total:
            self._last_line_at = now
            self._flush()

    def note(self, text: str) -> None:
        self._tell(text)

    def warn(self, text: str) -> None:
        self._tell(f"warning: {text}")

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        self._flush()
        self._evaluations[name] = dict(results)
        self._tell(f"evaluation {name}:  {headline_text(results)}")

    def saved(self, step: int, folder: str) -> None:
        """Not shown: the step's own line is there."""

    def finish(self, lines: Sequence[str]) -> None:
        self._flush()
        if len(self._evaluations) > 1:
            self._console.print(result_table(self._evaluations, self._console))
        for line in lines:
            self._print(line)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        """Print the newest step line that was held back, so that an early end shows where it ended."""
        if self._pending:
            self._tell(self._pending)
        self._pending = ""

    def _tell(self, line: str) -> None:
        self._print(self._stamp() + line)

    def _print(self, line: str) -> None:
        self._console.print(Text(escape_control(line)), soft_wrap=True, highlight=False)

    def _step_line(self, step: int, total: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step}/{total}"]
        if (followed := followed_metric(metrics)) in metrics:
            parts.append(f"{followed} {format_number(metrics[followed])}")
        if "reward/mean" in metrics:
            parts.append(f"reward {format_number(metrics['reward/mean'])}")
        if "throughput/completion_tokens_per_s" in metrics:
            rate = metrics["throughput/completion_tokens_per_s"]
            parts.append(f"{format_rate(rate)} tok/s")
        stages = stage_seconds(metrics)
        if stages:
            parts.append(", ".join(f"{name} {format_seconds(stages[name])}" for name in stages))
        if step < total:
            parts.append(f"ETA {format_clock(self._history.seconds_left())}")
        return "  ".join(parts)
