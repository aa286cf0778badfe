"""Transcripts read back: rows of one form, whether a step was written as a table or, by earlier versions, as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnow.disk.files import to_json
from rnow.disk.transcripts import FLOAT_LISTS, TOKEN_LISTS, schema, step_of
from rnow.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
"""The columns of ``transcripts.schema()`` by name, ``messages`` and ``answer`` as they were, ``rewards`` and ``reward_errors`` as
dicts. What an earlier version did not keep is None."""

SORTS = {
    "kl": "teacher_kl",
    "reward": "reward",
    "advantage": "advantage",
    "tokens": "completion_tokens",
}
"""What rollouts can be sorted by, and the column."""

_JSON = ("messages", "answer")
_MAPS = ("rewards", "reward_errors")
_OLD_LISTS = {
    "turn": "turn",
    "token_ids": "id",
    "tokens": "text",
    "sampler_logprobs": "sampler_logprob",
    "teacher_logprobs": "teacher_logprob",
    "kl": "kl",
}


def steps_of(folder: Path) -> dict[int, Path]:
    """The transcripts of a run by step, in order. A step that is there in both forms is read in the new one."""
    found = sorted(folder.glob("step-*"), key=lambda path: path.suffix != ".jsonl")
    return dict(sorted((step, path) for path in found if (step := step_of(path)) is not None))


def read_step(
    path: Path, choose: Callable[[Sequence[Row]], Iterable[int]] | None = None
) -> list[Row]:
    """The rollouts of one transcript.

    Args:
        choose: given all rows without their lists of tokens, which of them are read whole, in which order. All by default.

    Raises:
        InputError: the file is none, or cut, or of another kind.
    """
    with _readable(path):
        return _read_lines(path, choose) if path.suffix == ".jsonl" else _read_table(path, choose)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Some columns of one transcript, of whichever form; null where an earlier version did not keep one.

    Raises:
        InputError: the file is none, or cut, or of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = pa.schema([schema().field(name) for name in names])
    with _readable(path):
        if path.suffix == ".jsonl":
            rows = [
                row
                | {name: to_json(row[name]) for name in _JSON}
                | {name: list(row[name].items()) for name in _MAPS}
                for row in _read_lines(path)
            ]
            return pa.Table.from_pylist(rows, schema=wanted)
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in names if name in there])
        for name in (name for name in names if name not in there):
            table = table.append_column(name, pa.nulls(len(table), wanted.field(name).type))
        return table.select(list(names)).cast(wanted)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever readers of a format make of damaged bytes
        raise InputError(
            "this transcript cannot be read",
            where=str(path),
            why=" ".join(str(error).split())[:200] or type(error).__name__,
            fix="look at another step, or run `rnow run` again where the run is not finished",
        ) from error


def ordered(rows: Sequence[Row], by: str | None = None, *, reverse: bool = False) -> list[int]:
    """Indices of rows, the largest of ``SORTS[by]`` first, or in the order of the file; ``reverse``: the other way round. Those
    without that number come last."""
    if by is None:
        return list(range(len(rows)))[:: -1 if reverse else 1]
    values = [row[SORTS[by]] for row in rows]
    known = [i for i, value in enumerate(values) if value is not None and not math.isnan(value)]
    found = sorted(known, key=lambda index: values[index], reverse=not reverse)
    with_number = set(known)
    return found + [index for index in range(len(rows)) if index not in with_number]


def _read_table(path: Path, choose: Callable[[Sequence[Row]], Iterable[int]] | None) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if choose is None:
            table = file.read()
        else:
            plain = [name for name in schema().names if name not in TOKEN_LISTS]
            rows = row_dicts(file.read(columns=plain))
            table = file.read().take(pa.array(list(choose(rows)), pa.int64()))
    unknown = dict.fromkeys(schema().names)  # a file of an earlier version lacks columns
    return [unknown | row for row in row_dicts(table)]


def row_dicts(table: pa.Table) -> list[Row]:
    """The rows of a table that has ``messages`` and ``answer`` among its columns."""
    rows = table.to_pylist(maps_as_pydicts="strict")
    return [row | {name: json.loads(row[name]) for name in _JSON} for row in rows]


def _read_lines(
    path: Path, choose: Callable[[Sequence[Row]], Iterable[int]] | None = None
) -> list[Row]:
    # Not splitlines(): U+2028 and its like stand unescaped inside the texts.
    lines = filter(None, path.read_text(encoding="utf-8").split("\n"))
    rows = [_from_line(json.loads(line)) for line in lines]
    return rows if choose is None else [rows[index] for index in choose(rows)]


def _from_line(line: Row) -> Row:
    tokens = line.pop("tokens")
    row: Row = dict.fromkeys(schema().names) | {"rewards": {}, "reward_errors": {}} | line
    row["completion_tokens"] = len(tokens)
    for name, key in _OLD_LISTS.items():
        values = [token[key] for token in tokens]
        unknown = name in FLOAT_LISTS and values and all(value is None for value in values)
        row[name] = None if unknown else values
    return row
