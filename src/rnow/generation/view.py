"""What ``rnow generate`` shows while it works, and at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rnow.generation.budget import Budget, Spent
from rnow.generation.desk import Tally
from rnow.generation.store import answers_path

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0
"""Between two lines where nothing can be drawn over."""
_SHOWN = 10
"""Reasons; an endpoint may word each refusal otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What one call of ``generate`` did, and what there is now.

    Attributes:
        output, rows: the file, and the rows in it.
        answers: to these prompts, whoever gave them and whenever; ``gone``: to others, which are not in the file of prompts now.
        rejected: those of ``answers`` that are no row, by reason.
        asked: conversations of this call, ``faults`` of them to no end, by reason; ``unasked``: left over.
        capped: a limit ended it.
        spent, cost: on everything so far; ``cost`` is None without prices.
    """

    output: Path
    teacher: str
    rows: int
    answers: int
    gone: int
    rejected: Counter[str]
    faults: Counter[str]
    asked: int
    unasked: int
    capped: bool
    spent: Spent
    cost: float | None


def summary_lines(summary: Summary) -> Iterator[str]:
    """The end of a call, line by line."""
    yield (
        f"{summary.output}: {_counted(summary.rows, 'row')} of {_counted(summary.answers, 'answer')}; "
        f"{summary.asked} asked now, by {summary.teacher}"
    )
    for reason, count in summary.rejected.most_common():
        yield f"  left out: {count} x {reason}"
    if summary.gone:
        yield f"  left out: {summary.gone} x its prompt is not asked any more"
    for reason, count in summary.faults.most_common(_SHOWN):
        yield f"  no answer: {count} x {reason}"
    if summary.capped:
        yield (
            f"  a limit is reached: {_counted(summary.unasked, 'conversation')} not asked. "
            "Raise --max-tokens or --max-cost for the rest"
        )
    most = "at most " if summary.spent.estimated else ""
    cost = "" if summary.cost is None else f", cost {most}{summary.cost:.4g}"
    yield (
        f"  spent in all: {most}{summary.spent.prompt_tokens:,} tokens read, "
        f"{summary.spent.completion_tokens:,} written{cost}"
    )
    yield f"  every answer, kept or not: {answers_path(summary.output)}"


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, *, total: int, budget: Budget) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._console = console
        self._total = total
        self._budget = budget
        self._said = time.monotonic()
        self._bar = Bar(
            TextColumn("answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal or not total,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def told(self, tally: Tally) -> None:
        """After a conversation."""
        left_out, failed = tally.rejected.total(), tally.faults.total()
        parts = [f"{tally.kept} kept"]
        parts += [f"{left_out} left out"] if left_out else []
        parts += [f"{failed} failed"] if failed else []
        parts.append(f"{self._budget.spent.tokens:,} tokens")
        if cost := self._budget.cost:
            parts.append(f"cost {cost:.4g}")
        text = ", ".join(parts)
        self._bar.update(self._task, completed=tally.done, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said > LINE_SECONDS:
            self._said = now
            self._console.print(f"{tally.done} of {self._total}: {text}", highlight=False)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
