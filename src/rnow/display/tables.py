"""The table of evaluation results at the end of a run: before, after, teacher, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rnow.display.terminal import bar, escape_control, format_number

_MAX_ROWS = 10
_MAX_METRICS = 4


def quiet_table() -> Table:
    """An empty table with a line below its header and no frame."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
        border_style="dim",
    )


def headline(results: Mapping[str, float]) -> dict[str, float]:
    """The few metrics of an evaluation that are worth a line: ``pass@k``, teacher_kl, and the mean reward when there is
    no ``pass@k``. An evaluation with none of these shows what it has.
    """
    passed = sorted((name for name in results if name.startswith("pass@")), key=_pass_order)
    chosen = [*passed[:3], "teacher_kl"]
    if not passed:
        chosen.append("reward/mean")
    shown = {name: results[name] for name in chosen if name in results}
    return shown or dict(list(results.items())[:_MAX_METRICS])


def headline_text(results: Mapping[str, float]) -> str:
    """``headline`` in one line, and how far the student is from each of several teachers."""
    by_teacher = {
        name.removeprefix("teacher_kl/"): value
        for name, value in results.items()
        if name == "teacher_kl/teacher" or name.startswith("teacher_kl/teacher/")
    }
    shown = headline(results) | by_teacher
    return "  ".join(f"{key} {format_number(value)}" for key, value in shown.items())


def _pass_order(name: str) -> tuple[int, str]:
    digits = name.removeprefix("pass@")
    return (int(digits) if digits.isdecimal() else 1 << 30, name)


def result_table(evaluations: Mapping[str, Mapping[str, float]], console: Console) -> Table:
    """One row per evaluation, one column per metric; a bar shows the first metric and, where it fits, the second.

    A bar is full at 1 for values within [0, 1], at the largest value otherwise. With many periodic evaluations the
    first and the newest rows are shown.
    """
    names = list(evaluations)
    if len(names) > _MAX_ROWS:
        names = names[:2] + names[-(_MAX_ROWS - 2) :]
    metrics = list(dict.fromkeys(key for name in names for key in headline(evaluations[name])))
    metrics = metrics[:_MAX_METRICS]
    unicode = console.encoding.lower().startswith("utf")
    widest_name = max((len(escape_control(name)) for name in names), default=0)
    spare = console.width - 6 - widest_name - sum(max(len(name), 7) + 4 for name in metrics)
    bars = 2 if spare >= 44 and len(metrics) > 1 else 1 if spare >= 8 else 0
    bar_width = min(24, spare // bars - 3) if bars else 0

    table = quiet_table()
    table.add_column("evaluation", no_wrap=True)
    for index, metric in enumerate(metrics):
        table.add_column(Text(escape_control(metric)), justify="right", no_wrap=True)
        if index < bars:
            table.add_column("", width=bar_width, no_wrap=True)
    for name in names:
        style = "bold green" if name == "after" else "cyan" if name == "teacher" else ""
        cells = [Text(escape_control(name), style=style)]
        for index, metric in enumerate(metrics):
            value = evaluations[name].get(metric)
            cells.append(Text("-" if value is None else format_number(value), style=style))
            if index < bars:
                top = _full_scale([evaluations[other].get(metric, math.nan) for other in names])
                share = math.nan if value is None else value / top
                cells.append(Text(bar(share, bar_width, unicode=unicode), style=style))
        table.add_row(*cells)
    return table


def _full_scale(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    largest = max(finite, default=1.0)
    if largest <= 0:
        return 1.0
    return 1.0 if 0.5 <= largest <= 1.0 else largest
