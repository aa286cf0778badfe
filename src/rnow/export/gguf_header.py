"""The head of a GGUF file: what a model says of itself there. The format: docs/gguf.md of the ggml project."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, TypeAlias

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9

Value: TypeAlias = "bool | int | float | str | list[Value]"


def read_header(path: Path) -> dict[str, Value]:
    """The metadata of a GGUF file by their keys, ``tokenizer.ggml.add_bos_token`` among them; numbers of tensors are not read.

    Raises:
        ValueError: it is no whole head of a GGUF file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        reader = _Reader(file, path.stat().st_size)
        version = reader.number("I")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version} of the format")
        reader.number("Q")  # of tensors
        found: dict[str, Value] = {}
        for _ in range(reader.number("Q")):
            name = reader.text()
            found[name] = reader.value(reader.number("I"))
        return found


class _Reader:
    """Little-endian values, one after the other."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def number(self, kind: str) -> int:
        return self._unpack(kind)

    def text(self) -> str:
        return self._take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if count > self._size:
                raise ValueError("it is cut off, or damaged")
            return [self.value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"it holds a value of the unknown kind {kind}")
        return self._unpack(_NUMBERS[kind])

    def _unpack(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self._take(struct.calcsize(kind)))
        return value

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise ValueError("it is cut off, or damaged")
        return data
