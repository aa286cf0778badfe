"""Reading a .jsonl file: every line is checked before anything is used, in constant memory per line."""

from __future__ import annotations

import codecs
from pathlib import Path

from rnow.config.schema import DatasetSource
from rnow.errors import DataError
from rnow.project.faults import FaultList, excerpt
from rnow.project.json_text import JsonFault, parse
from rnow.project.row_file import RowCollector, RowFile
from rnow.project.rows import RowRules
from rnow.text.user_files import open_regular

MAX_LINE_BYTES = 16 * 2**20
_FOREIGN_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_rows(path: Path, source: DatasetSource, rules: RowRules) -> RowFile:
    """Every row of ``path``. Blank lines are skipped; a byte-order mark and CRLF are accepted.

    Args:
        path: a local file, that of ``source``.
        rules: what the rows must look like.

    Raises:
        DataError: listing up to 10 faults with line, column and excerpt; reading stops at a line over 16 MB.
        NotYetSupported: when the only faults are features that this version lacks.
    """
    rows = RowCollector(source=source, rules=rules)
    stopped_early = False
    try:
        with open_regular(path) as stream:
            for number, line in enumerate(
                iter(lambda: stream.readline(MAX_LINE_BYTES + 2), b""), 1
            ):
                stopped_early = _no_row_can_follow(number, line, rows.faults)
                if stopped_early:
                    break
                _read_line(number, line, rows)
    except OSError as error:
        raise DataError(
            f"{source.path} cannot be read", where=source.path, why=error.strerror or str(error)
        ) from None
    return rows.finish(
        empty="is empty",
        fix=f"write one JSON object per line, e.g. {rules.example}",
        stopped_early=stopped_early,
    )


def _no_row_can_follow(number: int, line: bytes, faults: FaultList) -> bool:
    """Whether the file is not one of lines in UTF-8, after adding that as a fault."""
    foreign = [
        name for mark, name in _FOREIGN_BOMS.items() if number == 1 and line.startswith(mark)
    ]
    if foreign:
        message = f"the file is {foreign[0]}, not UTF-8"
        faults.add("line 1", message, column=1, fix="save the file as UTF-8")
    elif len(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")) > MAX_LINE_BYTES:
        faults.add(
            f"line {number}",
            "the line is longer than 16 MB",
            column=MAX_LINE_BYTES + 1,
            shown=excerpt(line[:200].decode("utf-8", "backslashreplace")),
            fix="one row per line: is this file an array, or does it lack line ends?",
        )
    else:
        return False
    return True


def _read_line(number: int, line: bytes, rows: RowCollector) -> None:
    """Add the row of one line, or its faults; nothing for a blank line."""
    place, ended = f"line {number}", line.endswith(b"\n")
    data = line.rstrip(b"\r\n") if ended else line
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    text = data.decode("utf-8", "backslashreplace")

    def add(column: int, message: str, fix: str) -> None:
        rows.faults.add(place, message, column=column, shown=excerpt(text, column), fix=fix)

    try:
        data.decode("utf-8")
        if text and not text.isspace():
            rows.add(parse(text), place, text=text, line=number)
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} (byte {error.start + 1} of the line)"
        column = len(data[: error.start].decode("utf-8")) + 1
        add(column, f"{at} is not UTF-8", "save the file as UTF-8")
    except JsonFault as fault:
        if fault.cut and not ended:
            message = f"the last line is cut short ({fault.message})"
            add(fault.column, message, "complete or remove the last line")
        else:
            add(fault.column, fault.message, fault.fix)
