"""Checkpoints that a crash cannot spoil.

Commit order: free-space check, write into ``.tmp-<step>-<pid>``, fsync, manifest (sizes and sha256) last, rename to
``step-000120``, fsync the parent, only then prune. Safetensors and JSON only: nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rnow.disk.files import (
    readable_json,
    replace_file,
    sha256_of,
    sync_folder,
    unused,
    write_synced,
)
from rnow.errors import InputError, TemporaryError
from rnow.types import Adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MOMENTS = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MOMENTS, STATE)
FREE_SPACE_MARGIN = 1.1

_NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint, loaded: ``state`` is what was saved as JSON."""

    step: int
    folder: Path
    adapter: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in ``folder``.

    Args:
        keep: how many committed checkpoints stay, at least 2.
        warn: told about damaged checkpoints that were moved aside.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._keep = max(2, keep)
        self._warn = warn

    def save(
        self,
        step: int,
        *,
        adapter: Adapter,
        moments: Mapping[str, Tensor],
        state: Mapping[str, Any],
        good_before: int = 0,
    ) -> Path:
        """Commit a checkpoint after ``step`` finished steps and return its folder.

        Args:
            good_before: the newest checkpoint of a step before this one stays, whatever its age.

        Raises:
            TemporaryError: the disk is full; earlier checkpoints are untouched.
        """
        target = self._folder / f"step-{step:06d}"
        files = {
            **peft_files(adapter),
            MOMENTS: _safetensors(moments),
            STATE: readable_json(state),
        }
        aside = self._folder / f".tmp-{step}-{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_space(sum(map(len, files.values())))
            self._write_aside(aside, step, files)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._disk_full(str(error)) from error
        self._prune(good_before)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest verifies, or None when there is none at all. A damaged one is renamed to
        ``damaged-...`` and named, never deleted.

        Raises:
            InputError: there are checkpoints, and every one is damaged.
        """
        self._remove_leftovers()
        damaged = []
        for folder in reversed(self._committed()):
            fault = self._fault(folder)
            if fault is None:
                return self._load(folder)
            aside = unused(folder.with_name(f"damaged-{folder.name}"))
            folder.rename(aside)
            damaged.append(f"{folder.name}: {fault}; kept as {aside.name}")
            self._warn(f"checkpoint {folder.name} is damaged ({fault}); moved to {aside.name}")
        # Those that an earlier start moved aside: without them this run would begin again, over its own files.
        damaged = damaged or sorted(path.name for path in self._folder.glob("damaged-step-*"))
        if damaged:
            raise InputError(
                "every checkpoint of this run is damaged",
                details=damaged,
                where=str(self._folder),
                fix="start over in a new folder with --fresh, or put back a copy of a checkpoint",
            )
        return None

    def newest_step(self, *, before: int | None = None) -> int | None:
        """The step of the newest committed checkpoint (of those of a step below ``before``), unverified."""
        steps = map(_step_of, self._committed())
        return max((step for step in steps if before is None or step < before), default=None)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed * FREE_SPACE_MARGIN:
            raise self._disk_full(f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _disk_full(self, why: str) -> TemporaryError:
        step = self.newest_step()
        kept = (
            "no earlier checkpoint" if step is None else f"the last good checkpoint is step {step}"
        )
        return TemporaryError(
            f"no space left to save a checkpoint; {kept}",
            where=str(self._folder),
            why=why,
            fix="free some space, then run the same command again: it continues from there",
        )

    def _write_aside(self, aside: Path, step: int, files: Mapping[str, bytes]) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, data in files.items():
            write_synced(aside / name, data)
        entries = {
            name: {"size": len(data), "sha256": sha256_of(aside / name)}
            for name, data in files.items()
        }
        manifest = {"format": 1, "step": step, "files": entries}
        write_synced(aside / MANIFEST, readable_json(manifest))
        sync_folder(aside)

    def _committed(self) -> list[Path]:
        return sorted(
            (path for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name)),
            key=_step_of,
        )

    def _fault(self, folder: Path) -> str | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            entries = manifest["files"]
            expected = [(name, entries[name]["size"], entries[name]["sha256"]) for name in FILES]
            if manifest["step"] != _step_of(folder):
                return f"it is step {manifest['step']} under another name"
            for name, size, digest in expected:
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes, not {size}"
                if sha256_of(path) != digest:
                    return f"{name} was changed"
        except (FileNotFoundError, NotADirectoryError):
            return "no manifest"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "unreadable manifest"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return None

    def _load(self, folder: Path) -> Checkpoint:
        return Checkpoint(
            step=_step_of(folder),
            folder=folder,
            adapter=load_file(folder / ADAPTER_WEIGHTS),
            moments=load_file(folder / MOMENTS),
            state=json.loads((folder / STATE).read_text(encoding="utf-8")),
        )

    def _prune(self, good_before: int) -> None:
        good = self.newest_step(before=good_before)
        for folder in self._committed()[: -self._keep]:
            if _step_of(folder) == good:
                continue
            # Renamed first: a crash in the middle of a delete must not leave half a checkpoint under a good name.
            doomed = folder.with_name(f".tmp-old-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for leftover in self._folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def export_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as PEFT does, each file in one step, so that ``folder`` is loadable at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in peft_files(adapter).items():
        replace_file(folder / name, data)


def peft_files(adapter: Adapter) -> dict[str, bytes]:
    """An adapter as the files that PEFT and vLLM load, by name."""
    return {
        ADAPTER_WEIGHTS: _safetensors(adapter.tensors),
        ADAPTER_CONFIG: readable_json(adapter.config),
    }


def random_state() -> dict[str, Tensor]:
    """torch's CPU generator, as a tensor that safetensors can hold."""
    return {"rng.torch_cpu": torch.get_rng_state()}


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Undo ``random_state``."""
    if "rng.torch_cpu" in tensors:
        torch.set_rng_state(tensors["rng.torch_cpu"])


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
