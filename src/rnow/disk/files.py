"""Writing files so that a crash leaves the old content or the new, never half of either."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rnow import progress

CHUNK = 1 << 20


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    progress.moved()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put new content under a name in one step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(aside, data)
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def unused(path: Path) -> Path:
    """The first of ``name``, ``name-2``, ``name-3`` ... that does not exist."""
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def to_json(value: object, *, indent: int | None = None, compact: bool = False) -> str:
    """Strict JSON: NaN and infinities become null, keys keep their order. ``compact``: in ASCII and without blanks."""
    write = partial(
        json.dumps,
        ensure_ascii=compact,
        allow_nan=False,
        indent=indent,
        separators=(",", ":") if compact else None,
    )
    try:
        return write(value)
    except (
        ValueError,
        TypeError,
    ):  # NaN, or a mapping that is no dict. A copy of everything else, token by token, is for this case alone.
        return write(finite(value))


def readable_json(value: Mapping[str, object]) -> bytes:
    """The content of a JSON file for people to read."""
    return _encoded(to_json(value, indent=2))


def json_line(value: Mapping[str, object], *, compact: bool = False) -> bytes:
    """One line of a file of JSON lines."""
    return _encoded(to_json(value, compact=compact))


def _encoded(text: str) -> bytes:
    # A lone surrogate, which UTF-8 cannot hold, becomes \udc80: its own escape in JSON.
    return f"{text}\n".encode("utf-8", "backslashreplace")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none, or it is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def finite(value: object) -> object:
    """A copy of JSON-like data with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
