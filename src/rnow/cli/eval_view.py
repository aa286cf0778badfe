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
    from rich.console import Console

    from rnow.setup.eval_report import EvalReport

WIDEST = 1000


def eval_view(report: EvalReport, console: Console) -> Iterator[Table | Text]:
    """What is printed, from the top. ``console``: on which; where the table is too wide for it, each k has a line of its own."""
    table, anywhere = _wide(report), console.options.update(width=WIDEST)
    wanted = console.measure(table, options=anywhere).maximum
    yield table if wanted <= console.width else _tall(report)
    yield Text(HOW, style="dim")
    if any(not row.fresh for row in report.rows):
        read = ", ".join(row.subject.name for row in report.rows if not row.fresh)
        yield Text(escape_control(f"read back: {read}; --again measures anew"), style="dim")
    for row in report.rows:
        yield Text(escape_control(f"{row.subject.name}: {row.kept}"), style="dim")
        if row.failed:
            text = f"{row.failed:.1%} of the answers of {row.subject.name} failed, or a reward on them; that counts as 0"
            yield Text(escape_control(f"{text}. --again measures anew"), style="yellow")


def _wide(report: EvalReport) -> Table:
    table = quiet_table()
    table.add_column(_name(report.prompts), overflow="fold")
    for title in _titles(report).values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name, cells, length in _lines(report):
        table.add_row(_name(name), *cells.values(), length)
    return table


def _tall(report: EvalReport) -> Table:
    table, titles = quiet_table(), _titles(report)
    table.add_column(_name(report.prompts), overflow="fold")
    for title in ("", "", "tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, cells, length in _lines(report):
        for k, cell in cells.items():
            table.add_row(_name(name), titles[k], cell, length)
            name = length = ""
    return table


def _titles(report: EvalReport) -> dict[int, str]:
    temperatures = report.rows[0].temperatures
    return {k: f"pass@{k} at {temperature:g}" for k, temperature in temperatures.items()}


def _lines(report: EvalReport) -> Iterator[tuple[str, dict[int, Text], str]]:
    """Who, k -> its pass@k, and the length of an answer."""
    first, *others = report.rows
    for row, found in zip(report.rows, report.intervals(), strict=True):
        length = "-" if row.length is None else format_number(row.length)
        yield row.subject.name, {k: _cell(value) for k, value in found.items()}, length
    for row, found in zip(others, report.differences(), strict=True):
        cells = {k: _cell(value, signed=True) for k, value in found.items()}
        yield f"{row.subject.name} - {first.subject.name}", cells, ""


def _name(text: str) -> Text:
    return Text(escape_control(text))


def _cell(value: Interval, *, signed: bool = False) -> Text:
    """``0.531 [0.44, 0.62]``; a difference that the interval tells from none is bold."""
    form = "+.3f" if signed else ".3f"
    text = f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"
    return Text(text, style="bold" if signed and not value.low <= 0 <= value.high else "")
