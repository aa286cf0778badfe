"""What is wrong with the rows of one file, and how it is shown: line, column, reason and an excerpt of the text."""

from __future__ import annotations

from dataclasses import dataclass, field

from rnow.errors import MAX_SHOWN, DataError, InputError, NotYetSupported
from rnow.usercode.text import escape

_MAX_KEPT = 10_000
_EXCERPT_WIDTH = 60
_EXCERPT_BEFORE = 24


@dataclass(slots=True)
class FaultList:
    """Keeps the first 10,000 faults as lines and counts the rest, so that memory stays small however bad a file is."""

    total: int = 0
    _lines: list[str] = field(default_factory=list)
    _first_place: str = ""
    _fixes: set[str | None] = field(default_factory=set)
    _supported: int = 0

    def add(
        self,
        place: str,
        message: str,
        *,
        column: int | None = None,
        shown: str = "",
        fix: str | None = None,
        unsupported: bool = False,
    ) -> None:
        """Record one fault: ``line 57, column 12: expecting ',' delimiter | {"a": 1 "b"``.

        Args:
            column: counts characters from 1, None where a row has no text of its own (parquet).
            shown: an excerpt of the text at fault.
        """
        self.total += 1
        self._supported += not unsupported
        self._fixes.add(fix)
        self._first_place = self._first_place or place
        if self.total <= _MAX_KEPT:
            where = place if column is None else f"{place}, column {column}"
            self._lines.append(f"{where}: {message}" + (f" | {shown}" if shown else ""))

    def error(self, label: str, *, stopped_early: bool = False) -> InputError:
        """The error that lists them: NotYetSupported when nothing else is wrong, DataError otherwise."""
        lines = [*self._lines]
        if self.total > _MAX_KEPT:
            lines.append(f"... and {self.total - _MAX_KEPT} more, which were not kept")
        cut: list[str] = []
        if stopped_early:
            cut = ["... the rest of the file was not read"]
        faults = "1 fault" if self.total == 1 else f"{self.total} faults"
        fix = next(iter(self._fixes)) if len(self._fixes) == 1 else None
        kind = DataError if self._supported else NotYetSupported
        return kind(
            f"{label} has {faults}",
            where=f"{label}, {self._first_place}",
            fix=fix or "correct these rows and run again",
            details=[*lines[:MAX_SHOWN], *cut],
            more=lines[MAX_SHOWN:],
        )


def excerpt(text: str, column: int | None = 1) -> str:
    """At most 60 characters of ``text`` around ``column`` (from 1), ``...`` where it was cut.

    Escapes make it longer, to 120 at most; the character at ``column`` is always in it.
    """
    center = min(max((column or 1) - 1, 0), max(len(text) - 1, 0))
    start = max(0, min(center - _EXCERPT_BEFORE, len(text) - _EXCERPT_WIDTH))
    end = min(start + _EXCERPT_WIDTH, len(text))
    before = [escape(character) for character in text[start:center]]
    room = 2 * _EXCERPT_WIDTH
    while sum(map(len, before)) > room // 2:
        del before[0]
        start += 1
    room -= sum(map(len, before))
    after = []
    for index in range(center, end):
        escaped = escape(text[index])
        room -= len(escaped)
        if room < 0:
            end = index
            break
        after.append(escaped)
    return ("..." if start else "") + "".join(before + after) + ("..." if end < len(text) else "")
