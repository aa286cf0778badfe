"""Heads of GGUF files, written by hand."""

from __future__ import annotations

import struct


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def header(**values: bytes) -> bytes:
    """The head of a file; each value with the number of its kind before it."""
    entries = b"".join(text(name.replace("__", ".")) + value for name, value in values.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + entries
