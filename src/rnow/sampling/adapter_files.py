"""The adapter as files that a server can load: PEFT's format, one folder per load, the previous one removed."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rnow.disk.checkpoints import ADAPTER_WEIGHTS, peft_files
from rnow.disk.tensors import gather
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
        dtype: the weights are rounded to it; None leaves them as they are.
        in_memory: the weights are in main memory, where that can be had (Linux), and the folder holds a link to them, which ends
            with this process. For a server on this machine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        private: bool = True,
        dtype: torch.dtype | None = None,
        in_memory: bool = False,
    ) -> None:
        self._folder = folder
        self._private = private
        self._dtype = dtype
        self._in_memory = in_memory
        self._held: dict[Path, int] = {}
        self._tag = secrets.token_hex(4)
        self._number = 0

    def write(self, adapter: Adapter, version: int) -> StoredAdapter:
        """Write ``adapter`` as PEFT does. The folder appears complete or not at all; it is not synced, since it is of no
        use after a crash.

        Raises:
            OSError: the disk, or the memory, is full or cannot be written.
        """
        if self._dtype is not None:
            adapter = replace(adapter, tensors=gather(adapter.tensors, dtype=self._dtype))
        self._number += 1
        mode = 0o700 if self._private else 0o755
        self._folder.mkdir(parents=True, exist_ok=True, mode=mode)
        target = self._folder / f"adapter-{version}"
        aside = self._folder / f".adapter-{version}"
        for folder in (target, aside):
            self._remove(folder)
        aside.mkdir(mode=mode)
        for name, data in peft_files(adapter).items():
            held = _anonymous_file() if self._in_memory and name == ADAPTER_WEIGHTS else None
            if held is not None:
                self._held[target] = held
                (aside / name).symlink_to(_path_of(held))
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
        self._remove(self._folder / stored.folder.name)

    def clear(self) -> None:
        """Remove everything that was written."""
        for folder in [*self._held]:
            self._remove(folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if (held := self._held.pop(folder, None)) is not None:
            os.close(held)


def _anonymous_file() -> int | None:
    """The descriptor of a file in main memory that no folder holds, and that is gone with this process however it ends; None where
    there is none that other processes of this user could open."""
    if not hasattr(os, "memfd_create"):
        return None
    held = os.memfd_create("rnow-adapter")
    if _path_of(held).exists():
        return held
    os.close(held)
    return None


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
