"""Where the rows of one dataset come from: a local .jsonl, .json or .parquet, or a HuggingFace dataset id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rnow.config.schema import DatasetSource
from rnow.errors import DataError, InputError
from rnow.project.faults import FaultList, excerpt
from rnow.project.json_text import JsonFault, parse
from rnow.project.jsonl import read_rows
from rnow.project.row_file import RowCollector, RowFile
from rnow.project.rows import RowRules
from rnow.project.templates import ROWS_SCRIPT
from rnow.text.suggest import closest, did_you_mean
from rnow.text.user_files import is_present, open_regular, place_of, read_regular

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[\w.-]+)?", re.ASCII)
_LOCAL_SUFFIXES = frozenset((".jsonl", ".json", ".parquet"))
_KEY = "data.train_file"


def read_source(source: DatasetSource, rules: RowRules, base_dir: Path) -> RowFile:
    """The rows of one dataset, all checked.

    A path with a known suffix, or which exists, is a file; ``org/name`` (``org/name:config`` for one of several
    configurations) is a HuggingFace dataset, of which ``source.split`` is read. Columns ``prompt`` and ``question``
    become a user message where there are no ``messages``.

    Raises:
        DataError: a missing or faulty file, a dataset that cannot be fetched, or rows at fault.
        NotYetSupported: rows that need a feature this version lacks.
    """
    path = place_of(source.path, Path(base_dir), where=_KEY, fault=DataError)
    try:
        return _read_local(source, path, rules)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise DataError(f"{source.path} cannot be read", where=_KEY, why=reason) from None


def _read_local(source: DatasetSource, path: Path, rules: RowRules) -> RowFile:
    if path.is_dir():
        raise DataError(
            f"{source.path} is a folder, not a file",
            where=_KEY,
            fix="name a .jsonl, .json or .parquet file inside it",
        )
    if not path.exists():
        if path.suffix.lower() not in _LOCAL_SUFFIXES and _HUB_ID.fullmatch(source.path):
            return _read_hub(source, rules)
        raise _missing(source.path, path)
    is_present(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _check_table(_parquet_rows(path, source.path), rules, source)
    if suffix == ".json" and _starts_with_array(path):
        return _check_table(_array_rows(path, source.path), rules, source)
    return read_rows(path, source, rules)


def _missing(name: str, path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"{name} does not exist: there is no folder {folder}",
            where=_KEY,
            fix="correct the path",
        )
    files = sorted(
        entry.name for entry in folder.iterdir() if entry.suffix.lower() in _LOCAL_SUFFIXES
    )
    near = closest(path.name, files, count=3, cutoff=0.5) or files[:3]
    prefix = name[: -len(path.name)] if name.endswith(path.name) else ""
    fix = "correct the path, or give a HuggingFace dataset id like org/name"
    if near:
        fix = did_you_mean([prefix + file for file in near])
    if path.name == "train.jsonl" and (folder / ROWS_SCRIPT).is_file():
        fix = f"python {ROWS_SCRIPT} writes it"
    return DataError(f"{name} does not exist", where=_KEY, why=f"looked for {path}", fix=fix)


def _check_table(rows: Iterable[object], rules: RowRules, source: DatasetSource) -> RowFile:
    """Rows that have no text of their own: places are ``row N`` (from 1), and there is no column."""
    checked = RowCollector(source=source, rules=rules)
    for number, raw in enumerate(rows, start=1):
        checked.add(raw, f"row {number}")
    return checked.finish(empty="has no rows", fix="give it at least one row")


def _without_nulls(row: Mapping[str, object]) -> dict[str, object]:
    """A row of a table without its empty columns."""
    return {key: value for key, value in row.items() if value is not None}


def _parquet_rows(path: Path, label: str) -> Iterator[dict[str, object]]:
    # pyarrow is what `datasets` reads parquet with; going to it directly leaves no copy in a cache folder.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(
                    f"{label} has several columns of one name: {', '.join(twice)}",
                    where=label,
                    fix="rename or drop all but one",
                )
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield _without_nulls(row)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label} holds text that is not UTF-8",
            where=label,
            why=_first_line(error),
            fix="write the table anew, its text as UTF-8",
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{label} is not a readable parquet file",
            where=label,
            why=_first_line(error),
            fix="write or download it anew",
        ) from None


def _starts_with_array(path: Path) -> bool:
    with open_regular(path) as stream:
        head = stream.read(4096)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array_rows(path: Path, label: str) -> list[object]:
    try:
        text = read_regular(path).decode("utf-8-sig")
        rows = parse(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label} is not UTF-8 at byte {error.start + 1}", where=label, fix="save it as UTF-8"
        ) from None
    except JsonFault as fault:
        line = text.count("\n", 0, fault.column - 1) + 1
        start = text.rfind("\n", 0, fault.column - 1) + 1
        column = fault.column - start
        end = text.find("\n", start)
        shown = excerpt(text[start : end if end >= 0 else len(text)], column)
        faults = FaultList()
        faults.add(f"line {line}", fault.message, column=column, shown=shown)
        raise faults.error(label) from None
    return rows if isinstance(rows, list) else []


def _read_hub(source: DatasetSource, rules: RowRules) -> RowFile:
    name, _, config = source.path.partition(":")
    label = source.path
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "reading a HuggingFace dataset needs the `datasets` package",
            where=_KEY,
            why=_first_line(error),
            fix="pip install datasets",
        ) from None
    try:
        table = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:
        raise _hub_error(label, source.split, error) from None
    return _check_table((_without_nulls(dict(row)) for row in table), rules, source)


def _hub_error(label: str, split: str, error: Exception) -> DataError:
    """What to do depends on the words of the error: the library raises ValueError for half of its cases."""
    reason = _first_line(error)
    kind = type(error).__name__
    lowered = reason.lower()
    if "config name is missing" in lowered or "builderconfig" in lowered:
        fix = f"name one of its configurations: data.train_file: {label.partition(':')[0]}:CONFIG"
    elif "split" in lowered:
        fix = "choose a split that exists: data.train_file: [{path: ..., split: ...}]" + (
            f" (now {split})"
        )
    elif "gated" in lowered or "401" in lowered or "403" in lowered:
        fix = "accept its terms on its page and log in with `hf auth login`"
    elif "offlinemode" in lowered:
        fix = "unset HF_HUB_OFFLINE, or download it and give a local .jsonl or .parquet file"
    elif kind == "DatasetNotFoundError":
        fix = (
            "check the spelling (ids are case-sensitive), or `hf auth login` for a private dataset"
        )
    else:
        fix = "check the network, or download it and give a local .jsonl or .parquet file"
    return DataError(
        f"the dataset {label} cannot be loaded", where=_KEY, why=f"{kind}: {reason}", fix=fix
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
