"""The report of `rnow eval` as a table: each subject, and how the others differ from the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rnow.display.tables import quiet_table
from rnow.display.terminal import escape_control, format_number
from rnow.training.intervals import HOW, Interval

if TYPE_CHECKING:
    from rnow.setup.eval_report import EvalReport


def eval_view(report: EvalReport) -> Iterator[Table | Text]:
    """What is printed, from the top."""
    first, *others = report.rows
    table = quiet_table()
    table.add_column(_name(report.prompts), overflow="fold")
    for k, temperature in first.temperatures.items():
        table.add_column(f"pass@{k} at {temperature:g}", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for row, found in zip(report.rows, report.intervals(), strict=True):
        length = "-" if row.length is None else format_number(row.length)
        table.add_row(_name(row.subject.name), *map(_cell, found.values()), length)
    for row, found in zip(others, report.differences(), strict=True):
        name = _name(f"{row.subject.name} - {first.subject.name}")
        table.add_row(name, *(_cell(value, signed=True) for value in found.values()), "")
    yield table
    yield Text(HOW, style="dim")
    if any(not row.fresh for row in report.rows):
        read = ", ".join(row.subject.name for row in report.rows if not row.fresh)
        yield Text(escape_control(f"read back: {read}; --again measures anew"), style="dim")
    for row in report.rows:
        yield Text(escape_control(f"{row.subject.name}: {row.kept}"), style="dim")
        if row.failed:
            text = f"{row.failed:.1%} of the answers of {row.subject.name} failed, or a reward on them; that counts as 0"
            yield Text(escape_control(f"{text}. --again measures anew"), style="yellow")


def _name(text: str) -> Text:
    return Text(escape_control(text))


def _cell(value: Interval, *, signed: bool = False) -> Text:
    """``0.531 [0.44, 0.62]``; a difference that the interval tells from none is bold."""
    form = "+.3f" if signed else ".3f"
    text = f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"
    return Text(text, style="bold" if signed and not value.low <= 0 <= value.high else "")
