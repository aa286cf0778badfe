"""What a study came to, as a table: on a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rnow.display.tables import quiet_table
from rnow.display.terminal import escape_control, format_number
from rnow.training.intervals import OVER_SEEDS, Interval

if TYPE_CHECKING:
    from rnow.setup.study import Study

MAX_MEASURES = 3


def study_table(study: Study) -> Table:
    """One row for each setting; below every other one how it differs from the first, bold where the interval leaves out 0."""
    shown, table = study.measures()[:MAX_MEASURES], quiet_table()
    keys = _keys(study)
    for key in (*keys, "seeds"):
        table.add_column(Text(escape_control(key)), overflow="fold")
    for name in shown:
        table.add_column(Text(escape_control(name)), justify="right", overflow="fold")
    for row in study.rows():
        values = dict(row.setting)
        cells = [Text(escape_control(values.get(key, ""))) for key in keys]
        done = Text(f"{row.done}/{row.of}", style="" if row.done == row.of else "red")
        table.add_row(*cells, done, *(_cell(row.measures.get(name)) for name in shown))
        if row.minus_first:
            found = (_cell(row.minus_first.get(name), signed=True) for name in shown)
            blank = [Text() for _ in keys]
            table.add_row(*blank, Text("- first", style="dim"), *found)
    return table


def study_markdown(study: Study) -> str:
    """The whole of it as a page: every measure, and the runs."""
    names, keys = study.measures(), _keys(study)
    rows = []
    for row in study.rows():
        values = dict(row.setting)
        cells = [values.get(key, "") for key in keys]
        rows.append(
            [*cells, f"{row.done}/{row.of}", *(_words(row.measures.get(name)) for name in names)]
        )
        if row.minus_first:
            found = (_words(row.minus_first.get(name), signed=True) for name in names)
            rows.append([*("" for _ in keys), "- first", *found])
    runs = [[one.run.name, one.error or "done"] for one in study.results]
    parts = [
        f"# {_inert(study.name)}",
        _markdown([*keys, "seeds", *names], rows),
        f"{OVER_SEEDS}.",
        _markdown(["run", "outcome"], runs),
    ]
    return "\n\n".join(parts) + "\n"


def _keys(study: Study) -> list[str]:
    return list(dict.fromkeys(key for one in study.results for key, _ in one.run.setting))


def _words(value: Interval | float | None, *, signed: bool = False) -> str:
    """``0.531 [0.44, 0.62]``; a single seed has no interval."""
    if value is None:
        return "-"
    if isinstance(value, Interval):
        bounds = (value.mean, value.low, value.high)
        mean, low, high = (f"{x:+.3f}" if signed else format_number(x) for x in bounds)
        return f"{mean} [{low}, {high}]"
    return f"{value:+.3f}" if signed else format_number(value)


def _cell(value: Interval | float | None, *, signed: bool = False) -> Text:
    told = isinstance(value, Interval) and not value.low <= 0 <= value.high
    style = ("bold" if told else "dim") if signed else ""
    return Text(_words(value, signed=signed), style=style)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_inert, line))} |" for line in lines)


def _inert(text: str) -> str:
    """One cell: no line break, no bar, no markup."""
    one = escape_control(" ".join(text.split()))
    return one.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
