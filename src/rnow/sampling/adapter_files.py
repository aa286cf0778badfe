"""The adapter as files that a server can load: PEFT's format, one folder per load, the previous one removed."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rnow.disk.checkpoints import peft_files
from rnow.types import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """One adapter on disk. ``number`` counts loads from 1. ``name`` is never used twice, neither by another run nor when a
    version is loaded again with other weights: vLLM's prefix cache goes by it."""

    name: str
    number: int
    version: int
    folder: Path


class AdapterFiles:
    """Writes adapters below ``folder``.

    Args:
        private: only this user can read them. A server of another user needs False.
    """

    def __init__(self, folder: Path, *, private: bool = True) -> None:
        self._folder = folder
        self._private = private
        self._tag = secrets.token_hex(4)
        self._number = 0

    def write(self, adapter: Adapter, version: int) -> StoredAdapter:
        """Write ``adapter`` as PEFT does. The folder appears complete or not at all; it is not synced, since it is of no
        use after a crash.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self._number += 1
        mode = 0o700 if self._private else 0o755
        self._folder.mkdir(parents=True, exist_ok=True, mode=mode)
        target = self._folder / f"adapter-{version}"
        aside = self._folder / f".adapter-{version}"
        for folder in (target, aside):
            if folder.exists():
                shutil.rmtree(folder)
        aside.mkdir(mode=mode)
        for name, data in peft_files(adapter).items():
            (aside / name).write_bytes(data)
            (aside / name).chmod(mode & 0o666)
        aside.rename(target)
        return StoredAdapter(
            name=self._name(version),
            number=self._number,
            version=version,
            folder=target.resolve(),
        )

    def renamed(self, stored: StoredAdapter) -> StoredAdapter:
        """The same files as another adapter: what vLLM keeps by name or number is not taken for it."""
        self._number += 1
        return replace(stored, name=self._name(stored.version), number=self._number)

    def _name(self, version: int) -> str:
        return f"rnow-{self._tag}-{version}-{self._number}"

    def discard(self, stored: StoredAdapter) -> None:
        """Remove an adapter's files."""
        shutil.rmtree(stored.folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self._folder, ignore_errors=True)
