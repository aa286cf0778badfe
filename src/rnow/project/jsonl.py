"""Reading a .jsonl file: every line is checked before anything is used, in constant memory per line."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rnow.errors import DataError
from rnow.project.faults import Fault, FaultList, excerpt
from rnow.project.json_text import JsonFault, column_of, parse
from rnow.project.rows import ROW_KEYS, Row, RowRules, check_row, unknown_keys
from rnow.text.suggest import hint

MAX_LINE_BYTES = 16 * 2**20
_FOREIGN_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """The rows of one file in order, and what should be told about them though it is no fault."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()


class UnknownKeys:
    """Counts the unknown keys of a file's rows, for one warning at the end."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def see(self, row: object) -> None:
        """Take note of one row."""
        if isinstance(row, dict):
            self._counts.update(unknown_keys(row))

    def warnings(self, label: str) -> tuple[str, ...]:
        """At most one sentence."""
        if not self._counts:
            return ()
        shown = sorted(self._counts)[:5]
        names = ", ".join(f'"{excerpt(name)}"{hint(name, ROW_KEYS)}' for name in shown)
        more = (
            f" and {len(self._counts) - len(shown)} more" if len(self._counts) > len(shown) else ""
        )
        return (f"{label}: these keys of its rows are ignored: {names}{more}",)


def read_rows(path: Path, rules: RowRules, *, label: str | None = None) -> RowFile:
    """Every row of ``path``. Blank lines are skipped; a byte-order mark and CRLF are accepted.

    Args:
        path: a local file.
        rules: what the rows must look like.
        label: the file's name in messages; default the path's last part.

    Raises:
        DataError: listing up to 10 faults with line, column and excerpt; reading stops at a line over 16 MB.
        NotYetSupported: when the only faults are features that this version lacks.
    """
    label = label or path.name
    faults = FaultList()
    unknown = UnknownKeys()
    rows: list[Row] = []
    stopped_early = False
    try:
        with path.open("rb") as stream:
            for line in _lines(stream):
                encoding = _foreign_encoding(line)
                if line.too_long or encoding:
                    faults.add(_wrong_encoding(encoding) if encoding else _too_long(line))
                    stopped_early = True
                    break
                row = _read_line(line, rules, faults, unknown)
                if row is not None and not faults.total:
                    rows.append(row)
    except OSError as error:
        raise DataError(
            f"{label} cannot be read", where=label, why=error.strerror or str(error)
        ) from None
    if faults.total:
        raise faults.error(label, stopped_early=stopped_early)
    if not rows:
        raise DataError(
            f"{label} is empty",
            where=label,
            fix='write one JSON object per line, e.g. {"messages": [{"role": "user", "content": "Hi"}]}',
        )
    return RowFile(rows=tuple(rows), warnings=unknown.warnings(label))


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    data: bytes
    ended: bool
    too_long: bool = False


def _lines(stream: BinaryIO) -> Iterator[_Line]:
    number = 0
    while data := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        ended = data.endswith(b"\n")
        body = data.rstrip(b"\r\n") if ended else data
        if number == 1:
            body = body.removeprefix(codecs.BOM_UTF8)
        yield _Line(number, body, ended, too_long=len(body) > MAX_LINE_BYTES)


def _too_long(line: _Line) -> Fault:
    return Fault(
        place=f"line {line.number}",
        column=MAX_LINE_BYTES + 1,
        message="the line is longer than 16 MB",
        excerpt=excerpt(line.data[:200].decode("utf-8", "backslashreplace")),
        fix="one row per line: is this file an array, or does it lack line ends?",
    )


def _wrong_encoding(encoding: str) -> Fault:
    return Fault(
        place="line 1",
        column=1,
        message=f"the file is {encoding}, not UTF-8",
        excerpt="",
        fix="save the file as UTF-8",
    )


def _read_line(line: _Line, rules: RowRules, faults: FaultList, unknown: UnknownKeys) -> Row | None:
    """The row of one line; None after adding its faults, and for a blank line."""
    place = f"line {line.number}"

    def add(
        column: int, message: str, text: str, fix: str | None, unsupported: bool = False
    ) -> None:
        faults.add(
            Fault(
                place=place,
                column=column,
                message=message,
                excerpt=excerpt(text, column),
                fix=fix,
                unsupported=unsupported,
            )
        )

    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = line.data.decode("utf-8", "backslashreplace")
        column = len(line.data[: error.start].decode("utf-8")) + 1
        add(column, _bad_bytes(line, error), text, "save the file as UTF-8")
        return None
    if not text or text.isspace():
        return None
    try:
        value = parse(text)
    except JsonFault as fault:
        if fault.cut and not line.ended:
            message = f"the last line is cut short ({fault.message})"
            add(fault.column, message, text, "complete or remove the last line")
        else:
            add(fault.column, fault.message, text, fault.fix)
        return None
    unknown.see(value)
    result = check_row(value, rules, line=line.number)
    if isinstance(result, Row):
        return result
    for fault in result:
        add(column_of(text, fault.path), fault.message, text, fault.fix, fault.unsupported)
    return None


def _bad_bytes(line: _Line, error: UnicodeDecodeError) -> str:
    return f"byte 0x{line.data[error.start]:02x} (byte {error.start + 1} of the line) is not UTF-8"


def _foreign_encoding(line: _Line) -> str | None:
    if line.number != 1:
        return None
    return next((name for mark, name in _FOREIGN_BOMS.items() if line.data.startswith(mark)), None)
