"""`rnow compare` on a terminal: curves on one scale, evaluations with intervals, differing settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rnow.comparing.runs import Course, better_end, thinned
from rnow.config.overrides import show
from rnow.display.tables import quiet_table
from rnow.display.terminal import escape_control, format_number, one_line, sparkline
from rnow.training.intervals import HOW, Interval

if TYPE_CHECKING:
    from rnow.comparing.compared import Comparison
    from rnow.comparing.evaluations import Measured

CURVE, LEAST_CURVE = 40, 10
MAX_VALUE = 60
_NUMBERS = 38
"""Columns that the numbers beside a curve take."""


def compare_view(found: Comparison, *, width: int, unicode: bool) -> Iterator[Table | Text]:
    """What is printed, from the top."""
    yield _curves(found, width=width, unicode=unicode)
    if found.measured:
        yield Text()
        yield _evaluations(found)
        yield Text(HOW, style="dim")
    yield Text()
    if found.settings:
        yield _settings(found)
    else:
        yield Text("the configs are the same")
    if found.contents:
        yield Text(f"other contents: {', '.join(found.contents)}", style="yellow")


def _curves(found: Comparison, *, width: int, unicode: bool) -> Table:
    """One block for each metric, one line in it for each run; the curves of a block have one scale."""
    names = (*found.courses, *(f"  {run.label}" for run in found.runs))
    spare = width - max(len(escape_control(name)) for name in names) - _NUMBERS
    curve = max(1, min(CURVE, max(LEAST_CURVE, spare), found.end))
    table = quiet_table()
    table.add_column("metric", overflow="fold")
    table.add_column(f"steps 1 to {found.end}", no_wrap=True)
    for name in ("first", "last", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric, courses in found.courses.items():
        table.add_row(Text(escape_control(metric), style="bold"))
        scale = [value for one in courses if one for value in one.values]
        for run, one in zip(found.runs, courses, strict=True):
            name = Text(f"  {escape_control(run.label)}")
            if one is None:
                table.add_row(name, Text("-", style="dim"))
                continue
            points = thinned(one, end=found.end, count=curve)
            drawn = sparkline(points, width=curve, scale=scale, unicode=unicode)
            table.add_row(name, Text(drawn, style="cyan"), *_numbers(one, courses, metric))
    return table


def _numbers(one: Course, courses: Sequence[Course | None], metric: str) -> list[Text]:
    """First, last and best; the best last one of all runs is green."""
    lasts = [other.last for other in courses if other]
    end = better_end(metric)
    leads = len(lasts) > 1 and end and one.last == (min if end == "low" else max)(lasts)
    best = "" if one.best is None else f"{format_number(one.best[1])} ({one.best[0]})"
    return [
        Text(format_number(one.first)),
        Text(format_number(one.last), style="green" if leads else ""),
        Text(best),
    ]


def _evaluations(found: Comparison) -> Table:
    table = quiet_table()
    table.add_column("evaluation", overflow="fold")
    for run in found.runs:
        table.add_column(Text(escape_control(run.label)), justify="right", overflow="fold")
    for name, row in found.measured.items():
        table.add_row(Text(escape_control(name)), *map(_measured, row))
        differences = found.differences(name)
        if any(differences):
            first = escape_control(found.runs[0].label)
            cells = [Text(), *(_difference(one) for one in differences)]
            table.add_row(Text(f"  - {first}", style="dim"), *cells)
    return table


def _measured(one: Measured | None) -> Text:
    if one is None:
        return Text("-", style="dim")
    interval = one.interval
    if interval is None:
        return Text(format_number(one.value))
    return Text(f"{one.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")


def _difference(value: Interval | None) -> Text:
    """One that its interval tells from none is bold."""
    if value is None:
        return Text("-", style="dim")
    sure = not value.low <= 0 <= value.high
    text = f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
    return Text(text, style="bold" if sure else "dim")


def _settings(found: Comparison) -> Table:
    table = quiet_table()
    table.add_column("differing setting", overflow="fold")
    for run in found.runs:
        table.add_column(Text(escape_control(run.label)), overflow="fold")
    for key, values in found.settings.items():
        cells = (one_line(show(value), MAX_VALUE) for value in values)
        table.add_row(Text(escape_control(key)), *(Text(escape_control(cell)) for cell in cells))
    return table
