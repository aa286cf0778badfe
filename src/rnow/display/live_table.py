"""The display for a terminal: a header, a table of recent steps, a progress bar, and a summary at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rnow.display.downloads import Download
from rnow.display.history import StepHistory, StepRow, followed_metric, stage_seconds
from rnow.display.tables import headline_text, quiet_table, result_table
from rnow.display.terminal import (
    escape_control,
    format_clock,
    format_number,
    format_rate,
    format_seconds,
    sparkline,
)

_ROWS = 8
_TREND_STEPS = 20
_LINES_AROUND_TABLE = 8
_REFRESH_PER_SECOND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """A column of the step table. When the terminal is narrow the largest ``rank`` goes first."""

    key: str
    title: str
    width: int
    rank: int
    always: bool = True
    """Also when no step has such a metric."""


_GAP = 2
_LONGEST_LABEL = 16
_CODE = "    "
"""What a line of code begins with."""
_STAGES = ("rollout", "teacher", "update", "other")


class LiveTable:
    """Draws the run in place, a few times per second, and leaves the last picture when it closes."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._history = StepHistory(clock)
        self._began = clock()
        self._stage = ""
        self._downloads: dict[str, Download] = {}
        self._live: Live | None = None
        self._finished = False
        self._evaluations: dict[str, Mapping[str, float]] = {}
        self._unicode = console.encoding.lower().startswith("utf")
        self._spinner = Spinner("dots" if self._unicode else "line", style="cyan")

    # -- what the loop calls -----------------------------------------------------------------------------------------

    def start(self, plan_lines: Sequence[str]) -> None:
        self._console.print(_header(plan_lines))
        self._open()

    def stage(self, name: str) -> None:
        self._stage = name
        self._open()

    def download(self, download: Download) -> None:
        self._downloads[download.name] = download
        coming = [one.line() for one in self._downloads.values() if one.done < one.total]
        self.stage("; ".join(coming) or download.line())

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._open()
        self._history.add(step, total, metrics)

    def note(self, text: str) -> None:
        self._print_marked("· " if self._unicode else "- ", "dim", text)

    def warn(self, text: str) -> None:
        self._print_marked("▲ " if self._unicode else "! ", "yellow", f"warning: {text}")

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        self._evaluations[name] = dict(results)
        shown = headline_text(results)
        mark = "● " if self._unicode else "* "
        line = Text.assemble((mark, "cyan"), f"{name}  ", (shown, "bold"))
        self._console.print(Text(escape_control(line.plain), spans=line.spans), highlight=False)

    def saved(self, step: int, folder: str) -> None:
        """Not shown: the step's own line is there."""

    def finish(self, lines: Sequence[str]) -> None:
        self._finished = True
        self.close()
        if self._evaluations:
            self._console.print()
            self._console.print(result_table(self._evaluations, self._console))
        self._console.print()
        self._console.print(Rule(Text("done", style="bold green"), align="left", style="green"))
        for line in lines:
            # Code, paths and whatever else is longer than a line stay whole, to be copied; the rest breaks between words.
            whole = line.startswith((_CODE, "adapter: ")) or any(
                len(word) > self._console.width for word in line.split()
            )
            self._console.print(_closing_line(line), soft_wrap=whole, highlight=False)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = not self._history.rows  # nothing worth leaving behind
            self._stage = ""
            live.stop()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield self.picture(options.max_width)

    def picture(self, width: int) -> RenderableType:
        """The part that is redrawn: table, progress bar, and what is happening now."""
        parts: list[RenderableType] = []
        if self._history.rows:
            parts += [Text(), self._table(width), Text(), self._progress(width)]
        if not self._finished and self._stage:
            self._spinner.text = Text(escape_control(self._stage), style="dim")
            parts.append(self._spinner)
        return Group(*parts)

    def _print_marked(self, mark: str, style: str, text: str) -> None:
        self._console.print(Text.assemble((mark, style), escape_control(text)), highlight=False)

    def _open(self) -> None:
        if self._live is None and not self._finished:
            self._live = Live(
                self,
                console=self._console,
                refresh_per_second=_REFRESH_PER_SECOND,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)
            self._history.restart_clock()

    def _table(self, width: int) -> Table:
        columns = choose_columns(width, self._history)
        table = quiet_table()
        for column in columns:
            table.add_column(
                column.title,
                justify="left" if column.key == "trend" else "right",
                width=column.width,
                no_wrap=True,
            )
        room = max(2, min(_ROWS, self._console.height - _LINES_AROUND_TABLE))
        rows = self._history.thinned(room)
        for row in rows:
            newest = row is rows[-1]
            table.add_row(
                *(Text(self._cell(column, row)) for column in columns),
                style="bold" if newest else "dim",
            )
        return table

    def _cell(self, column: _Column, row: StepRow) -> str:
        metrics = row.metrics
        if column.key == "step":
            return f"{row.number}/{self._history.total}"
        if column.key == "trend":
            followed = followed_metric(row.metrics)
            values = self._history.values(followed, up_to=row.number)
            # Every step that a trend in the table can show: one scale for all of them.
            first = self._history.thinned(_ROWS)[0].number - _TREND_STEPS
            recent = [
                row.metrics.get(followed, math.nan)
                for row in self._history.rows
                if row.number > first
            ]
            trend = sparkline(values, scale=recent, width=column.width, unicode=self._unicode)
            return trend.rjust(column.width)
        if column.key in _STAGES:
            stages = stage_seconds(metrics)
            return format_seconds(stages[column.key]) if column.key in stages else "-"
        if column.key not in metrics:
            return "-"
        value = metrics[column.key]
        if column.key == "completions/mean_length":
            return f"{value:.1f}"
        return format_rate(value) if column.key.startswith("throughput/") else format_number(value)

    def _progress(self, width: int) -> Table:
        history = self._history
        fraction = history.done / history.total if history.total else 0.0
        elapsed = format_clock(self._clock() - self._began)
        left = (
            "" if history.done >= history.total else f"ETA {format_clock(history.seconds_left())}"
        )
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            ProgressBar(
                total=max(1, history.total),
                completed=history.done,
                width=max(10, width - 40),
                complete_style="cyan",
                finished_style="green",
            ),
            Text(f"{fraction:4.0%}"),
            Text(f"elapsed {elapsed}", style="dim"),
            Text(left, style="bold cyan"),
        )
        return line


def choose_columns(width: int, history: StepHistory) -> list[_Column]:
    """The columns that fit ``width`` cells, in display order, the least important left out first."""
    total_digits = len(str(history.total))
    metrics = {name for row in history.rows for name in row.metrics}
    followed = followed_metric(metrics)
    # Nobody waits for answers or a teacher where rows are learned.
    stages = _STAGES if followed == "teacher_kl" else ("update", "other")
    columns = [
        _Column(key="step", title="step", width=max(5, 2 * total_digits + 1), rank=0),
        _Column(key=followed, title=followed, width=10, rank=1),
        _Column(key="trend", title="trend", width=_TREND_STEPS if width >= 100 else 10, rank=4),
        _Column(key="reward/mean", title="reward", width=7, rank=2, always=False),
        _Column(
            key="throughput/completion_tokens_per_s", title="tok/s", width=5, rank=3, always=False
        ),
        *(
            _Column(
                key=name,
                title=name,
                width=7 if name != "other" else 6,
                rank=5 + index,
                always=name in stages,
            )
            for index, name in enumerate(_STAGES)
        ),
        _Column(key="entropy", title="entropy", width=7, rank=9, always=False),
        _Column(key="completions/mean_length", title="length", width=6, rank=10, always=False),
    ]
    columns = [column for column in columns if column.always or column.key in metrics]
    while len(columns) > 1 and sum(column.width + _GAP for column in columns) > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns


def _header(plan_lines: Sequence[str]) -> Panel:
    """``label: value`` lines as two columns in a frame; other lines as they are."""
    rows = [_labelled(line) for line in plan_lines]
    body = Table.grid(padding=(0, 2, 0, 0))
    body.add_column(
        no_wrap=True, min_width=max((len(label) for label, _ in rows), default=0), style="dim"
    )
    body.add_column(overflow="fold")
    for label, value in rows:
        if label:
            body.add_row(Text(label), Text(value))
    loose = [Text(value) for label, value in rows if not label]
    return Panel(
        Group(body, *loose),
        title=Text("rnow", style="bold cyan"),
        title_align="left",
        border_style="cyan",
        padding=(0, 1),
    )


def _closing_line(line: str) -> Text:
    if line.startswith(_CODE):
        return Text(escape_control(line), style="bold cyan")
    label, value = _labelled(line)
    return Text.assemble((f"{label:<10}", "dim"), "  ", value) if label else Text(value)


def _labelled(line: str) -> tuple[str, str]:
    """``label: value`` as two safe texts; a line of another form as the value of an empty label."""
    line = escape_control(line)
    label, colon, value = line.partition(": ")
    return (label, value) if colon and len(label) <= _LONGEST_LABEL else ("", line)
