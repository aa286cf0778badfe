"""A model whose decoder layers are read from its files while it works, and dropped: never more than two are in memory.

Scoring needs each layer once for all sequences. While one layer is run by every pass (``rnow.models.lockstep``), the next is
read into the other of two places, which are as large as the largest layer and stay: an allocator keeps what is given back
to it. On a card the two places are there, and two more, pinned, in main memory, from which they are filled on a stream of
their own. The rest of the model (embeddings, norms, head, buffers) is loaded as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rnow.models.conversion import Reading, plan_readings
from rnow.models.lockstep import Lockstep
from rnow.models.offload import host_bytes
from rnow.models.parts import decoder_layers, layer_parameters
from rnow.models.tensor_files import TensorFiles
from rnow.models.weight_files import weight_files

T = TypeVar("T")

PLACES = 2
ALIGNMENT = 64
"""Bytes; what torch's own allocators give. The last bits of some sums depend on where in such a block a tensor begins."""
POLL_SECONDS = 0.2
"""How often a stop is looked for while a layer is being read."""


def open_streamed(
    local_dir: Path, device: torch.device, *, dtype: torch.dtype, attn_implementation: str | None
) -> tuple[Any, Mapping[str, Any], StreamedLayers]:
    """The model with its layers on the meta device, transformers' report of the loading, and the layers.

    Raises:
        Exception: whatever transformers makes of the folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(local_dir), local_files_only=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    streamed = {name for layer in layer_parameters(empty) for name in layer}
    files = TensorFiles(weight_files(local_dir))
    readings = plan_readings(empty, files.names)
    kept = {
        name
        for reading in readings
        if reading.target not in streamed
        for name, _ in reading.sources
    }
    state: dict[str, _Stored | _Promised] = {
        name: _Stored(files, name) if name in kept else _Promised(files.shape(name))
        for name in files.names
    }
    kind = type(empty)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config()  # of a model that also sees, the part that reads
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, "state_dict": state}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    model, report = kind.from_pretrained(None, output_loading_info=True, **arguments)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    formats = {name: entry.dtype for name, entry in state.items() if isinstance(entry, _Promised)}
    layers = StreamedLayers(
        model,
        [reading for reading in readings if reading.target in streamed],
        files,
        formats=formats,
        device=device,
        name=local_dir.name,
    )
    return model, report, layers


class _Unwanted(Exception):
    """Nobody waits any more for the layer that is being read."""


class _Stored:
    """A tensor of the files as transformers' loader takes it: read when it is asked for."""

    def __init__(self, files: TensorFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, index: object) -> Tensor:
        return self._files.load(self._name)


class _Promised:
    """The same of a tensor that is not read yet: the loader gets its shape, and says in which number format it wants it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.dtype: torch.dtype = torch.float32

    def __getitem__(self, index: object) -> _Promised:
        return self

    def to(self, *, device: object, dtype: torch.dtype | None) -> Tensor:
        self.dtype = dtype or self.dtype
        return torch.empty(self.shape, dtype=dtype, device="meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """One parameter of a layer: who holds it, what they hold while it is away and while it is there, and where it is read to."""

    holders: tuple[tuple[nn.Module, str], ...]
    absent: nn.Parameter
    present: nn.Parameter
    read: Tensor

    def put(self, parameter: nn.Parameter) -> None:
        for module, name in self.holders:
            module._parameters[name] = parameter


class StreamedLayers:
    """The layers of a model and the files they come from.

    Args:
        readings: what makes the parameters that are on the meta device.
        formats: of the tensors in ``readings``, by name: in which they are converted.
        name: of the model, for errors.
    """

    def __init__(
        self,
        model: Any,
        readings: Sequence[Reading],
        files: TensorFiles,
        *,
        formats: Mapping[str, torch.dtype],
        device: torch.device,
        name: str,
    ) -> None:
        self.non_finite: list[str] = []
        self._model, self._files, self._formats, self._device = model, files, formats, device
        parameters = layer_parameters(model)
        home = {target: index for index, layer in enumerate(parameters) for target in layer}
        self._readings: list[list[Reading]] = [[] for _ in parameters]
        for reading in readings:
            self._readings[home[reading.target]].append(reading)
        shifts = self._shifts(model)
        size = max((_layer_bytes(layer, shifts) for layer in parameters), default=0)
        self._places = _places(size, device)
        self._weights = [
            _lay_out(model, layer, self._places, index % PLACES, shifts)
            for index, layer in enumerate(parameters)
        ]
        self._scratch = torch.empty(max(map(self._scratch_bytes, readings), default=0), dtype=torch.uint8)  # fmt: skip
        self._seen: set[int] = set()
        self._lockstep = Lockstep(
            decoder_layers(model), begin=self._begin, end=self._end, scope=self._scope, name=name
        )
        self._poll: Callable[[], None] = lambda: None
        self._reading: Future[None] | None = None
        self._stopped = Event()
        self._stream: torch.cuda.Stream | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What is held on the device beside the rest of the model."""
        return self._places.there

    def run(self, passes: Sequence[Callable[[], T]], poll: Callable[[], None]) -> list[T]:
        """The results of passes through the model, in inference mode, each layer read once for all of them. ``poll``: called
        before each pass runs a layer, and while one is being read; may raise to stop.

        Raises:
            TemporaryError: the files cannot be read any more.
            BaseException: what a pass or ``poll`` raises.
        """
        self._poll = poll
        self._stopped.clear()
        if self._device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._device)
        with ThreadPoolExecutor(1, "rnow-layers") as self._reader:
            try:
                self._reading = self._reader.submit(self._read, 0)
                return self._lockstep.run(passes, poll)
            finally:
                self._stopped.set()
                self._reader.shutdown(wait=True, cancel_futures=True)

    def _begin(self, index: int) -> None:
        """Put layer ``index`` in, and have the next read into the place of the one before."""
        assert self._reading is not None
        while not wait([self._reading], timeout=POLL_SECONDS).done:
            self._poll()
        self._reading.result()
        if index + 1 < len(self._weights):
            self._reading = self._reader.submit(self._read, index + 1)
        self._places.begin(index % PLACES)
        for weight in self._weights[index].values():
            weight.put(weight.present)

    def _end(self, index: int) -> None:
        for weight in self._weights[index].values():
            weight.put(weight.absent)
        self._places.end(index % PLACES)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.inference_mode(), stream:
            yield

    def _read(self, index: int) -> None:
        """In a thread of its own: fill the place of a layer."""
        place, weights = index % PLACES, self._weights[index]
        self._places.begin_reading(place)
        for reading in self._readings[index]:
            if reading.converter is None:
                name, _ = reading.sources[0]
                self._files.read(name, weights[reading.target].read, self._check_stopped)
                continue
            load = partial(self._load, _Bump(self._scratch))
            for name, value in reading.convert(load, self._model).items():
                weights[name].read.copy_(value)
        if index not in self._seen:
            self._seen.add(index)
            self.non_finite += [
                name for name, weight in weights.items() if not is_finite(weight.read)
            ]
        self._places.end_reading(place)

    def _load(self, scratch: _Bump, name: str) -> Tensor:
        into = scratch.take(self._files.shape(name), self._formats[name])
        self._files.read(name, into, self._check_stopped)
        return into

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Unwanted

    def _shifts(self, model: Any) -> dict[str, int]:
        """How far behind a multiple of ``ALIGNMENT`` each parameter begins, by name. A whole model on a CPU is not copied out
        of its files: its tensors begin there as they do in the file, and do so here."""
        found: dict[str, int] = {}
        if self._device.type != "cpu":
            return found
        for reading in (each for layer in self._readings for each in layer):
            name, dtype = reading.sources[0][0], model.get_parameter(reading.target).dtype
            shift = self._files.offset(name) % ALIGNMENT
            if (
                reading.converter is None
                and self._files.dtype(name) == dtype
                and not shift % dtype.itemsize
            ):
                found[reading.target] = shift
        return found

    def _scratch_bytes(self, reading: Reading) -> int:
        if reading.converter is None:
            return 0
        sizes = ((self._files.shape(name), self._formats[name]) for name, _ in reading.sources)
        return sum(_padded(shape, dtype) for shape, dtype in sizes)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating point numbers holds no NaN and no infinity."""
    if tensor.is_meta or not tensor.numel():
        return True
    # One pass and no copy: NaN is carried through both, and infinity is one of them.
    smallest, largest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


class _Bump:
    """Tensors one after the other in a buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._at = buffer, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> Tensor:
        start = self._at + shift
        self._at += _padded(shape, dtype, shift)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._buffer[start : start + size].view(dtype).view(*shape)


def _padded(shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> int:
    size = shift + torch.Size(shape).numel() * dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def _unique(layer: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that have two names under the first."""
    first: dict[int, str] = {}
    for name, parameter in layer.items():
        first.setdefault(id(parameter), name)
    return {name: layer[name] for name in first.values()}


def _layer_bytes(layer: Mapping[str, nn.Parameter], shifts: Mapping[str, int]) -> int:
    return sum(
        _padded(parameter.shape, parameter.dtype, shifts.get(name, 0))
        for name, parameter in _unique(layer).items()
    )


def _lay_out(
    model: Any,
    layer: Mapping[str, nn.Parameter],
    places: _Places,
    place: int,
    shifts: Mapping[str, int],
) -> dict[str, _Weight]:
    """A layer's parameters as views of one place, by name."""
    read, there = _Bump(places.host[place]), _Bump(places.there[place])
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, parameter in layer.items():
        owner, _, leaf = name.rpartition(".")
        holders.setdefault(id(parameter), []).append((model.get_submodule(owner), leaf))
    made: dict[int, _Weight] = {}
    for name, parameter in _unique(layer).items():
        where = (parameter.shape, parameter.dtype, shifts.get(name, 0))
        strides = _strides(parameter)
        made[id(parameter)] = _Weight(
            holders=tuple(holders[id(parameter)]),
            absent=parameter,
            present=nn.Parameter(
                there.take(*where).as_strided(parameter.shape, strides), requires_grad=False
            ),
            read=read.take(*where).as_strided(parameter.shape, strides),
        )
    return {name: made[id(parameter)] for name, parameter in layer.items()}


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """Those of a converted parameter, which may be transposed, so that products take the same way; as long as it fills its
    place."""
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))  # fmt: skip
    dense = last + 1 == parameter.numel()
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


class _Places:
    """Two buffers in main memory, in which the layers are used where they were read.

    Attributes:
        host: into which layers are read.
        there: in which they are used.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.host = [host_bytes(size, pinned=pinned) for _ in range(PLACES)]
        self.there: list[Tensor] = self.host

    def begin_reading(self, place: int) -> None:
        """Before a layer is read into a place that no pass uses any more."""

    def end_reading(self, place: int) -> None:
        """After it was."""

    def begin(self, place: int) -> None:
        """Before the first pass uses a layer that was read."""

    def end(self, place: int) -> None:
        """After the last pass was given to the device."""


class _CardPlaces(_Places):
    """Two buffers on a card and two in main memory, with a stream that copies from the ones to the others."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, pinned=True)
        self.there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(PLACES)]
        self._used = [torch.cuda.Event() for _ in range(PLACES)]

    def begin_reading(self, place: int) -> None:
        self._copied[place].synchronize()  # what was read before has left main memory

    def end_reading(self, place: int) -> None:
        self._copying.wait_event(self._used[place])
        with torch.cuda.stream(self._copying):
            self.there[place].copy_(self.host[place], non_blocking=True)
            self._copied[place].record(self._copying)

    def begin(self, place: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[place])

    def end(self, place: int) -> None:
        self._used[place].record(torch.cuda.current_stream(self._device))


def _places(size: int, device: torch.device) -> _Places:
    return _CardPlaces(size, device) if device.type == "cuda" else _Places(size)
