"""An adapter merged into its base: a model like any other, in the form of the base's own files.

Tensor by tensor from file to file, so that a model larger than the memory is merged too: what the adapter does not change keeps its
bytes, what it changes is the float32 sum of both, rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rnow import progress
from rnow.errors import ModelError
from rnow.export.files import copy_beside
from rnow.models.adapter import TrainedAdapter
from rnow.models.conversion import Reading, plan_readings
from rnow.models.loading import stored_quantization
from rnow.models.refusal import one_line, shorten
from rnow.models.resolved import ResolvedModel
from rnow.models.shape import build_empty
from rnow.models.streaming import is_finite
from rnow.models.tensor_files import TensorFiles
from rnow.models.weight_files import WEIGHTS, WEIGHTS_INDEX, weight_files
from rnow.policy.lora import adapter_deltas, check_fit

SHARD_BYTES = 5 * 10**9
"""Of one file of weights; what the hub's own tools write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is to be done, decided before a weight is read.

    Attributes:
        dtype: of the merged weights; None for those of the base, each its own.
        files: the base's weights.
        model: the base without them.
        readings: what makes the parameters that the adapter changes, by the name of each tensor in the files that is part of it.
        deltas: what the adapter adds, by the parameter's name in ``model``.
    """

    base: ResolvedModel
    dtype: torch.dtype | None
    files: TensorFiles
    model: Any
    readings: Mapping[str, Reading]
    deltas: Mapping[str, Callable[[], Tensor]]

    def dtype_of(self, name: str) -> torch.dtype:
        """Of one tensor as it will be written."""
        stored = self.files.dtype(name)
        return stored if self.dtype is None or not stored.is_floating_point else self.dtype

    def bytes_of(self, name: str) -> int:
        """Of one tensor as it will be written."""
        return torch.Size(self.files.shape(name)).numel() * self.dtype_of(name).itemsize

    @property
    def bytes(self) -> int:
        """Of all weights as they will be written."""
        return sum(map(self.bytes_of, self.files.names))

    @property
    def parameters(self) -> int:
        """Numbers in the files."""
        return sum(torch.Size(self.files.shape(name)).numel() for name in self.files.names)

    @property
    def widest(self) -> torch.dtype:
        """Of what is merged: the dtype of most bits among the tensors that are changed."""
        return max(map(self.dtype_of, self.readings), key=lambda dtype: dtype.itemsize)


def plan_merge(
    base: ResolvedModel,
    adapter: TrainedAdapter,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
) -> Merge:
    """Look at both; see ``Merge``.

    Raises:
        ModelError: the base is stored quantised or cannot be read, or the adapter does not fit it.
    """
    _refuse_quantised(base, adapter)

    def empty() -> Any:
        return build_empty(base, trust_remote_code=trust_remote_code)

    check_fit(empty(), adapter)
    model = empty()
    try:
        files = TensorFiles(weight_files(base.local_dir))
    except (OSError, ValueError) as error:
        raise adapter.refusal.error(
            f"the weights of '{base.path}' cannot be merged with an adapter",
            why=one_line(error),
            fix="name the original model, in float32, bfloat16 or float16, with --base",
        ) from error
    deltas = adapter_deltas(empty(), adapter)
    readings = _changed(plan_readings(model, files.names), deltas, files, model)
    missing = sorted(deltas.keys() - {target for _, targets in readings for target in targets})
    if missing:
        raise adapter.refusal.error(
            f"{len(missing)} parameters that the adapter changes are not found in the weights of '{base.path}'",
            details=shorten(missing),
            fix="serve the adapter beside its base instead: rnow serve",
        )
    return Merge(
        base=base,
        dtype=dtype,
        files=files,
        model=model,
        readings={name: reading for reading, _ in readings for name, _ in reading.sources},
        deltas=deltas,
    )


def write_merged(merge: Merge, folder: Path) -> None:
    """Write the merged model into a folder, which is there: weights, configuration and tokenizer.

    Raises:
        ModelError: numbers overflow in the format asked for, or a stacked parameter cannot be taken apart as the base has it.
        TemporaryError: the base's files cannot be read any more.
        OSError: the disk is full.
    """
    sums = _Sums(merge)
    shards = _shards(merge)
    total = len(shards)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        tensors = {name: sums.take(name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # it is for this user alone otherwise
        where |= dict.fromkeys(names, file)
        progress.moved()
    if total > 1:
        index = {"metadata": {"total_size": merge.bytes}, "weight_map": where}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_beside(merge.base.local_dir, folder, merge.dtype)


def _refuse_quantised(base: ResolvedModel, adapter: TrainedAdapter) -> None:
    stored = stored_quantization(base.local_dir)
    if stored is None:
        return
    raise adapter.refusal.error(
        f"the base '{base.path}' is stored in {'4' if stored == 'nf4' else '8'} bits, and an adapter is merged into numbers",
        why="rounded to so few bits again, what the adapter adds would be lost",
        fix="name the original model, in float32, bfloat16 or float16, with --base; or serve the adapter beside its base: rnow serve",
    )


def _changed(
    readings: Sequence[Reading],
    deltas: Mapping[str, object],
    files: TensorFiles,
    model: Any,
) -> list[tuple[Reading, frozenset[str]]]:
    """Those readings that make a parameter which the adapter changes, each with what it makes."""
    made = ((reading, _makes(reading, files, model)) for reading in readings)
    return [(reading, targets) for reading, targets in made if not targets.isdisjoint(deltas)]


def _makes(reading: Reading, files: TensorFiles, model: Any) -> frozenset[str]:
    if reading.converter is None:
        return frozenset({reading.target})
    made = reading.convert(lambda name: torch.empty(files.shape(name), device="meta"), model)
    return frozenset(made)


def _shards(merge: Merge) -> list[list[str]]:
    """The names of the tensors of each file, in the order of the base's."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in merge.files.names:
        bytes_ = merge.bytes_of(name)
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


@dataclass(slots=True)
class _Sums:
    """The tensors as they are written. What a stacked parameter is taken apart into waits until it is asked for."""

    merge: Merge
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str) -> Tensor:
        """One tensor, once."""
        reading = self.merge.readings.get(name)
        if reading is None:
            found = self.merge.files.load(name)
        elif reading.converter is None:
            found = self._add(reading.target, self.merge.files.load(name).float())
        else:
            if name not in self.waiting:
                self.waiting |= self._add_stacked(reading)
            found = self.waiting.pop(name)
        result = found.to(self.merge.dtype_of(name)).contiguous()
        as_it_was = reading is None and result.dtype == self.merge.files.dtype(name)
        if not as_it_was and result.is_floating_point() and not is_finite(result):
            raise ModelError(
                f"{name} of '{self.merge.base.path}' holds numbers that {self.merge.dtype_of(name)} cannot hold",
                where="--dtype",
                why="they would become infinite",
                fix="leave --dtype out, or choose bfloat16 or float32",
            )
        return result

    def _add(self, target: str, value: Tensor) -> Tensor:
        delta = self.merge.deltas.get(target)
        if delta is None:
            return value
        added = delta()
        if added.shape != value.shape:
            raise self._not_undone(target, f"{tuple(value.shape)} and {tuple(added.shape)}")
        return value.add_(added)

    def _add_stacked(self, reading: Reading) -> dict[str, Tensor]:
        """The tensors of the files that make a parameter, after the adapter was added to it."""
        merge = self.merge
        made = reading.convert(lambda name: merge.files.load(name).float(), merge.model)
        added = {target: self._add(target, value) for target, value in made.items()}
        try:
            found = reading.undo(added, merge.model)
        except ValueError as error:
            raise self._not_undone(reading.target, str(error)) from error
        return {name: value.reshape(merge.files.shape(name)) for name, value in found.items()}

    def _not_undone(self, target: str, why: str) -> ModelError:
        return ModelError(
            f"{target} cannot be written as '{self.merge.base.path}' has it",
            title="Not merged",
            why=why,
            fix="serve the adapter beside its base instead: rnow serve",
        )
