"""The tensors of safetensors files, read one by one into memory that is there already."""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rnow import progress
from rnow.errors import SAME_COMMAND, TemporaryError

CHUNK = 8 * 2**20
"""Bytes read between two calls of ``poll``; and of the buffer through which another number format goes."""

_FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    file: int
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """Nothing is mapped into memory: a file that was cut off or a disk that fails is an error here, where it would end the
    process with a signal there, and what was read belongs to the caller alone.

    Args:
        files: open until this object is gone, so that what takes their names later changes nothing.

    Raises:
        OSError, ValueError: one cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = list(files)
        self._open: list[int] = []
        weakref.finalize(self, _close, self._open)
        self._places: dict[str, _Place] = {}
        for path in files:
            self._open.append(os.open(path, os.O_RDONLY))
            self._read_header(len(self._open) - 1)
        self._stamps = [_stamp(handle) for handle in self._open]
        self._buffer = torch.empty(CHUNK, dtype=torch.uint8)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self._places]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, as it is stored."""
        return self._places[name].dtype

    def offset(self, name: str) -> int:
        """Of one tensor's first byte in its file."""
        return self._places[name].offset

    def read(self, name: str, into: Tensor, poll: Callable[[], None] = lambda: None) -> None:
        """Fill ``into``, contiguous, in main memory and with as many numbers, in its own number format: the values that
        ``Tensor.to`` gives.

        Args:
            poll: called before each chunk; may raise to stop.

        Raises:
            TemporaryError: the file was changed or cut off meanwhile, or its disk fails.
        """
        place = self._places[name]
        try:
            if _stamp(self._open[place.file]) != self._stamps[place.file]:
                raise self._lost(place, "it was changed since the run began to read it")
            if place.dtype == into.dtype:
                self._copy(place, into, poll)
            else:
                self._convert(place, into, poll)
        except OSError as error:
            raise self._lost(place, str(error)) from error

    def load(self, name: str) -> Tensor:
        """One tensor of its own, as it is stored."""
        place = self._places[name]
        found = torch.empty(place.shape, dtype=place.dtype)
        self.read(name, found)
        return found

    def _copy(self, place: _Place, into: Tensor, poll: Callable[[], None]) -> None:
        target = into.reshape(-1).view(torch.uint8)
        for start in range(0, place.bytes, CHUNK):
            poll()
            self._fill(place, start, target[start : start + CHUNK])

    def _convert(self, place: _Place, into: Tensor, poll: Callable[[], None]) -> None:
        target, width = into.reshape(-1), place.dtype.itemsize
        for start in range(0, place.bytes, CHUNK):
            poll()
            piece = self._buffer[: min(CHUNK, place.bytes - start)]
            self._fill(place, start, piece)
            numbers = piece.view(place.dtype)
            target[start // width : start // width + len(numbers)].copy_(numbers)

    def _fill(self, place: _Place, start: int, target: Tensor) -> None:
        """The bytes of a tensor from ``start`` on, as many as ``target`` has."""
        there = target.numpy().data
        while there:
            count = os.preadv(self._open[place.file], [there], place.offset + start)
            if not count:
                raise self._lost(place, "it ends before its last tensor")
            start, there = start + count, there[count:]
        progress.moved()

    def _lost(self, place: _Place, why: str) -> TemporaryError:
        path = self._paths[place.file]
        return TemporaryError(
            f"the weights in {path.name} cannot be read any more",
            where=str(path),
            why=why,
            fix=f"put the file back as it was, then {SAME_COMMAND}",
        )

    def _read_header(self, file: int) -> None:
        (length,) = struct.unpack("<Q", os.pread(self._open[file], 8, 0))
        header = json.loads(os.pread(self._open[file], length, 8))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                if entry["dtype"] not in _FORMATS:
                    raise ValueError(
                        f"{name} is stored as {entry['dtype']}, which is not read here"
                    )
                self._places[name] = _Place(
                    file=file,
                    offset=8 + length + start,
                    bytes=end - start,
                    dtype=_FORMATS[entry["dtype"]],
                    shape=tuple(entry["shape"]),
                )


def _stamp(handle: int) -> tuple[int, int]:
    state = os.fstat(handle)
    return state.st_size, state.st_mtime_ns


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
