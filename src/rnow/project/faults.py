"""What is wrong with the rows of one file, and how it is shown: line, column, reason and an excerpt of the text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rnow.errors import DataError, InputError, NotYetSupported
from rnow.usercode.text import escape

MAX_SHOWN = 10
_EXCERPT_WIDTH = 60
_EXCERPT_BEFORE = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. ``column`` counts characters from 1, None where a row has no text of its own (parquet)."""

    place: str
    column: int | None
    message: str
    excerpt: str
    fix: str | None = None
    unsupported: bool = False

    def render(self) -> str:
        """One line: ``line 57, column 12: expecting ',' delimiter | {"a": 1 "b"``."""
        where = self.place if self.column is None else f"{self.place}, column {self.column}"
        return f"{where}: {self.message}" + (f" | {self.excerpt}" if self.excerpt else "")


@dataclass(slots=True)
class FaultList:
    """Keeps the first ten faults and counts the rest, so that memory stays small however bad a file is."""

    shown: list[Fault] = field(default_factory=list)
    total: int = 0
    _fixes: Counter[str | None] = field(default_factory=Counter)
    _supported: int = 0

    def add(self, fault: Fault) -> None:
        """Record one fault."""
        self.total += 1
        self._supported += not fault.unsupported
        self._fixes[fault.fix] += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(fault)

    def error(self, label: str, *, stopped_early: bool = False) -> InputError:
        """The error that lists them: NotYetSupported when nothing else is wrong, DataError otherwise."""
        details = [fault.render() for fault in self.shown]
        if self.total > len(self.shown):
            details.append(f"... and {self.total - len(self.shown)} more")
        if stopped_early:
            details.append("... the rest of the file was not read")
        faults = "1 fault" if self.total == 1 else f"{self.total} faults"
        fixes = [fix for fix in self._fixes if fix]
        fix = fixes[0] if len(fixes) == 1 and len(self._fixes) == 1 else None
        kind = DataError if self._supported else NotYetSupported
        return kind(
            f"{label} has {faults}",
            where=f"{label}, {self.shown[0].place}",
            fix=fix or "correct these rows and run again",
            details=details,
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
