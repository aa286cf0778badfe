"""Checkpoints that a crash cannot spoil.

Commit order: free-space check, write into ``.tmp-<step>-<pid>``, fsync, manifest (sizes and sha256) last, rename to
``step-000120``, fsync the parent, only then prune. Safetensors and JSON only: nothing here is ever unpickled.

The manifest binds step, run and content. What it does not bear out is damage: moved aside, named, and the one before it tried.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
from rnow.disk.folder import MANIFEST, saved_steps
from rnow.disk.tensors import gather
from rnow.errors import SAME_COMMAND, InputError, RnowError, TemporaryError
from rnow.types import Adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MOMENTS = "optimizer.safetensors"
STATE = "state.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MOMENTS, STATE)
FREE_SPACE_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint, loaded: ``state`` is what was saved as JSON."""

    step: int
    folder: Path
    adapter: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: Mapping[str, Any]


class _Damaged(Exception):
    """Why a folder is not a checkpoint of this run, in a few words."""


class CheckpointStore:
    """The checkpoints of one run, in ``folder``.

    Args:
        keep: how many committed checkpoints stay, at least 2.
        warn: told about damaged checkpoints that were moved aside.
        run: the run's id; a checkpoint of another run is not taken. None is unknown: one of any run is, and its id with it.
    """

    def __init__(
        self, folder: Path, *, keep: int, warn: Callable[[str], None], run: str | None = None
    ) -> None:
        self._folder = folder
        self._keep = max(2, keep)
        self._warn = warn
        self.run = run

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
            RnowError: the last update left numbers that are not finite, which nothing could be continued from.
        """
        adapter = replace(adapter, tensors=gather(adapter.tensors))
        moments = gather(moments)
        self._check_finite(step, {**adapter.tensors, **moments}, good_before)
        target = self._folder / folder_name(step)
        files = {
            **peft_files(adapter),
            MOMENTS: _safetensors(moments),
            STATE: readable_json(state),
        }
        aside = self._folder / f".tmp-{step}-{os.getpid()}"
        try:
            self._folder.mkdir(exist_ok=True)  # but never the run folder: it may have been removed
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
            InputError: there are checkpoints, and every one is damaged, or this user may not read one.
        """
        self._remove_leftovers()
        damaged = []
        for folder in reversed(saved_steps(self._folder).values()):
            try:
                return self._read(folder)
            except _Damaged as fault:
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
        steps = saved_steps(self._folder)
        return max((step for step in steps if before is None or step < before), default=None)

    def _check_finite(self, step: int, tensors: Mapping[str, Tensor], good_before: int) -> None:
        broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if broken:
            raise diverged(
                f"after step {step} the adapter holds numbers that are not finite",
                where=str(self._folder),
                why=f"an update was too large: of {len(broken)} tensors, the first is {broken[0]}",
                good=self.newest_step(before=good_before),
                otherwise="nothing was saved before",
            )

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed * FREE_SPACE_MARGIN:
            least = math.ceil(needed * FREE_SPACE_MARGIN)
            raise self._disk_full(f"{least:,} bytes needed, {free:,} bytes free")

    def _disk_full(self, why: str) -> TemporaryError:
        step = self.newest_step()
        kept = (
            "no earlier checkpoint" if step is None else f"the last good checkpoint is step {step}"
        )
        return TemporaryError(
            f"no space left to save a checkpoint; {kept}",
            where=str(self._folder),
            why=why,
            fix=f"free some space, then {SAME_COMMAND}: it continues from there",
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
        run = {} if self.run is None else {"run": self.run}
        manifest = {"format": 1, "step": step, **run, "files": entries}
        write_synced(aside / MANIFEST, readable_json(manifest))
        sync_folder(aside)

    def _read(self, folder: Path) -> Checkpoint:
        """Verify and load one checkpoint. Raises _Damaged, and InputError for one that this user may not read."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._check_binding(manifest, folder)
            for name in FILES:
                entry = manifest["files"][name]
                _check_file(folder / name, size=entry["size"], digest=entry["sha256"])
        except (FileNotFoundError, NotADirectoryError):
            raise _Damaged("no manifest") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Damaged("unreadable manifest") from None
        except PermissionError as error:
            raise InputError(
                f"this user may not read checkpoint {folder.name}",
                where=str(error.filename or folder),
                fix="change its permissions, or start over in a new folder with --fresh",
            ) from error
        except OSError as error:
            raise _Damaged(f"it cannot be read: {error.strerror}") from None
        return Checkpoint(
            step=_step_of(folder),
            folder=folder,
            adapter=_read_tensors(folder / ADAPTER_WEIGHTS),
            moments=_read_tensors(folder / MOMENTS),
            state=_read_state(folder / STATE),
        )

    def _check_binding(self, manifest: Mapping[str, Any], folder: Path) -> None:
        if manifest["step"] != _step_of(folder):
            raise _Damaged(f"it is step {manifest['step']} under another name")
        run = manifest.get("run")  # a run of an earlier version has none
        if None not in (run, self.run) and run != self.run:
            raise _Damaged("it is of another run")
        self.run = self.run or run

    def _prune(self, good_before: int) -> None:
        good = self.newest_step(before=good_before)
        for step, folder in [*saved_steps(self._folder).items()][: -self._keep]:
            if step == good:
                continue
            # Renamed first: a crash in the middle of a delete must not leave half a checkpoint under a good name.
            doomed = folder.with_name(f".tmp-old-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for leftover in self._folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def diverged(
    happened: str, *, where: str, good: int | None, otherwise: str, why: str | None = None
) -> RnowError:
    """The error for weights from which no finite update comes.

    Args:
        good: the step of the last good checkpoint.
        otherwise: what there is without one.
    """
    known, fix = (
        otherwise,
        "lower trainer.learning_rate, or set model.dtype: float32, then start over with --fresh",
    )
    if good is not None:
        known = f"the last good checkpoint is {folder_name(good)}"
        fix += (
            ", or move the checkpoints after the good one out of checkpoints/ to go on from there"
        )
    return RnowError(
        f"{happened}; {known}", title="Training diverged", where=where, why=why, fix=fix
    )


def export_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as PEFT does, each file in one step, so that ``folder`` is loadable at any time."""
    folder.mkdir(exist_ok=True)
    for name, data in peft_files(adapter).items():
        replace_file(folder / name, data)


def is_adapter(folder: Path) -> bool:
    """Whether there are an adapter's weights in ``folder``, whosever they are."""
    return (folder / ADAPTER_WEIGHTS).is_file()


def is_exported(folder: Path, *, checkpoint: Path) -> bool:
    """Whether ``folder`` holds the adapter of ``checkpoint``; any adapter, where there is no such checkpoint to tell."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            _check_file(folder / name, size=entries[name]["size"], digest=entries[name]["sha256"])
    except _Damaged:
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return is_adapter(folder)
    return True


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


def _check_file(path: Path, *, size: int, digest: str) -> None:
    if not path.is_file():
        raise _Damaged(f"{path.name} is missing")
    if path.stat().st_size != size:
        raise _Damaged(f"{path.name} has {path.stat().st_size} bytes, not {size}")
    if sha256_of(path) != digest:
        raise _Damaged(f"{path.name} was changed")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _Damaged(f"{path.name} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise _Damaged(f"{path.name} holds numbers that are not finite, in {name}")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    # A sum is one pass without a mask as large as the tensor; NaN and infinity survive it.
    return not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite())


def _read_state(path: Path) -> dict[str, Any]:
    """An object; where it counts something, by a number."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        state = None
    if isinstance(state, dict):
        counters = state.get("counters", {})
        values = [
            state.get("updates", 0),
            *(counters.values() if isinstance(counters, dict) else "?"),
        ]
        if all(isinstance(value, int | float) for value in values):
            return state
    raise _Damaged(f"{path.name} is not the state of a run")


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save(gather(tensors))


def folder_name(step: int) -> str:
    """Of the checkpoint after ``step`` steps."""
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
