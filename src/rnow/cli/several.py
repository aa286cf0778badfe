"""The table of a list of students: what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.display.tables import headline, quiet_table
from rnow.display.terminal import escape_control, format_number
from rnow.errors import EXIT_FAILED, RnowError

if TYPE_CHECKING:
    from rich.table import Table

    from rnow.setup.several import Outcome

MAX_METRICS = 2


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """One row per student: its run, its steps, what evaluations before and after say of it, or why it failed."""
    from rich.text import Text

    table = quiet_table()
    for column in ("student", "run", "steps", "before -> after", "outcome"):
        table.add_column(column, overflow="fold", justify="right" if column == "steps" else "left")
    for outcome in outcomes:
        values = {} if outcome.summary is None else outcome.summary.values
        cells = [
            outcome.student,
            outcome.name,
            str(values.get("steps", "-")),
            _progress(values),
            "trained" if outcome.error is None else f"failed: {outcome.reason}",
        ]
        style = "" if outcome.error is None else "red"
        table.add_row(*(Text(escape_control(cell), style=style) for cell in cells))
    return table


def outcome_values(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The same for scripts: the summary of each run that was trained, and the error of each that failed."""
    return {
        "runs": [
            {"student": one.student, "name": one.name, "error": one.reason}
            | dict({"status": "failed"} if one.summary is None else one.summary.values)
            for one in outcomes
        ]
    }


def result_line(values: Mapping[str, object]) -> str:
    """What a run came to, of its summary: ``quickstart: 150 steps, pass@1 0.41 -> 0.93; runs/quickstart/adapter``."""
    name = Path(str(values.get("run_dir", "run"))).name
    progress = _progress(values)
    parts = [f"{values.get('steps', '-')} steps", *([] if progress == "-" else [progress])]
    return f"{name}: {', '.join(parts)}; {values.get('adapter', 'no adapter')}"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """That of the first failure; 0 without one."""
    for error in (outcome.error for outcome in outcomes if outcome.error is not None):
        return error.exit_code if isinstance(error, RnowError) else EXIT_FAILED
    return 0


def _progress(values: Mapping[str, object]) -> str:
    """``pass@1 0.41 -> 0.93``; of the loss of rows or the teacher KL, means over the first and last steps, where
    nothing was evaluated."""
    evaluation = values.get("evaluation")
    rows = evaluation if isinstance(evaluation, Mapping) else {}
    before, after = (_numbers(rows.get(name)) for name in ("before", "after"))
    shown = list(headline(after))[:MAX_METRICS] if after else []
    if not shown:
        for name in ("loss", "teacher_kl"):
            course = _numbers(values.get(name))
            if {"first", "last"} <= course.keys():
                return f"{name} {format_number(course['first'])} -> {format_number(course['last'])}"
        return "-"
    return ", ".join(
        f"{name} {format_number(before[name]) if name in before else '-'} -> {format_number(after[name])}"
        for name in shown
    )


def _numbers(row: object) -> dict[str, float]:
    found = row.items() if isinstance(row, Mapping) else ()
    return {str(k): v for k, v in found if k != "step" and isinstance(v, int | float)}
