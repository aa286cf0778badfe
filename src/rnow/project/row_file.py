"""The rows of one file: checked as they come, and handed on when all of them are good."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rnow.config.schema import DatasetSource
from rnow.errors import DataError
from rnow.project.faults import FaultList, excerpt
from rnow.project.rows import Privileged, Row, RowRules, check_row
from rnow.text.strict_json import JsonPath, position_of
from rnow.text.suggest import hint
from rnow.types import Prompt

_QUESTIONS = ("prompt", "question")
"""Keys that become a user message where a row has no ``messages``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """The rows of one file in order, by prompt id what some tell their teacher alone, and what should be told about them
    though it is no fault."""

    rows: tuple[Prompt, ...]
    privileged: Mapping[str, Privileged] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class RowCollector:
    """Checks rows one at a time. From the first fault on only faults are kept."""

    source: DatasetSource
    rules: RowRules
    faults: FaultList = field(default_factory=FaultList)
    _rows: list[Prompt] = field(default_factory=list)
    _privileged: dict[str, Privileged] = field(default_factory=dict)
    _unknown: Counter[str] = field(default_factory=Counter)
    _questions: set[str] = field(default_factory=set)

    def add(
        self, value: object, place: str, *, text: str | None = None, line: int | None = None
    ) -> None:
        """Take one row, or its faults.

        Args:
            place: ``line 57``, ``row 3``.
            text: the JSON it was read from, for columns and excerpts; None for a row of a table.
        """
        value, question = (value, None) if self.rules.documents else _with_messages(value)
        if question is not None:
            self._questions.add(question)
        if isinstance(value, dict):
            self._unknown.update(value.keys() - self.rules.keys)
        row = check_row(value, self.rules, self.source, number=len(self._rows), line=line)
        if isinstance(row, Row):
            if not self.faults.total:
                self._rows.append(row.prompt)
                if row.privileged is not None:
                    self._privileged[row.prompt.id] = row.privileged
            return
        for fault in row:
            column = None if text is None else position_of(text, fault.path) + 1
            shown = _excerpt_of(value, fault.path) if text is None else excerpt(text, column)
            self.faults.add(
                place,
                fault.message,
                column=column,
                shown=shown,
                fix=fault.fix,
                unsupported=fault.unsupported,
            )

    def finish(self, *, empty: str, fix: str, stopped_early: bool = False) -> RowFile:
        """All rows, and what to say of them.

        Raises:
            DataError: there are faults, or no rows: ``empty`` and ``fix`` say so.
            NotYetSupported: when the only faults are features that this version lacks.
        """
        label = self.source.path
        if self.faults.total:
            raise self.faults.error(label, stopped_early=stopped_early)
        if not self._rows:
            raise DataError(f"{label} {empty}", where=label, fix=fix)
        notes = tuple(
            f'{label}: the column "{column}" is used as the user message'
            for column in sorted(self._questions)
        )
        if self._unknown:
            names = sorted(self._unknown)
            shown = ", ".join(
                f'"{excerpt(name)}"{hint(name, self.rules.keys)}' for name in names[:5]
            )
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            notes = (*notes, f"{label}: these keys of its rows are ignored: {shown}{more}")
        return RowFile(rows=tuple(self._rows), privileged=self._privileged, warnings=notes)


def _with_messages(raw: object) -> tuple[object, str | None]:
    """The row with ``messages``, and the column they were made from, if they were not there."""
    if not isinstance(raw, dict) or raw.get("messages") is not None:
        return raw, None
    for column in _QUESTIONS:
        value = raw.get(column)
        if isinstance(value, list):
            messages = value
        elif isinstance(value, str):
            messages = [{"role": "user", "content": value}]
        else:
            continue
        rest = {key: item for key, item in raw.items() if key not in (column, "messages")}
        return {**rest, "messages": messages}, column
    return raw, None


def _excerpt_of(value: object, path: JsonPath) -> str:
    for step in path:
        known: Mapping[object, object] = value if isinstance(value, dict) else {}
        if isinstance(value, list):
            known = dict(enumerate(value))
        if step not in known:
            break
        value = known[step]
    return excerpt(json.dumps(value, ensure_ascii=False, default=str)[:200])
