"""Moving a model out of a card and back, bit for bit. What does not change is copied out once, and from then on only back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rnow.errors import RnowError

HOST = torch.device("cpu")

# Where bitsandbytes keeps what belongs to a quantised weight, besides the weight itself.
_ATTACHED = ("quant_state", "state2", "state", "absmax", "code", "offset", "CB", "SCB")

Tensors = Callable[[], Iterable[Tensor]]
Versions = tuple[int, ...] | None
"""How often torch changed the tensors of a storage in place; None where that is not counted, or does not tell."""


class Offload:
    """What one part of a run holds on a card, and a place for it in main memory.

    Frozen tensors give their storage away and get it filled again: whoever holds a view of them (the head, a merged copy, a
    quantised weight's scales) holds the same view afterwards, and reading it in between is a mistake. Live tensors are what
    is trained; they move as a whole, so that they can be read, and saved, at any time. In both cases every tensor stays the
    object that it was, and the optimizer knows its parameters.

    Args:
        frozen, live: called at each ``sleep``, since both change over time. What is live may be among the frozen, too.
        stays: what of the frozen is read while the rest is away.
        what: for errors: ``the trainer``.
    """

    def __init__(
        self, *, frozen: Tensors, live: Tensors = tuple, stays: Tensors = tuple, what: str
    ) -> None:
        self._frozen = frozen
        self._changing: list[Tensors] = []
        self._stays = stays
        self._live = live
        self._what = what
        self._emptied: list[_Emptied] = []
        self._copies: dict[int, _Copy] = {}
        self._moved: list[tuple[Tensor, torch.device]] = []

    @property
    def asleep(self) -> bool:
        """Whether anything is away from where it belongs."""
        return bool(self._emptied or self._moved)

    def take_along(self, changing: Tensors) -> None:
        """Move these too from now on. They may change in any way between two calls of ``sleep``, each of which copies them."""
        self._changing.append(changing)

    def check_awake(self) -> None:
        """
        Raises:
            RuntimeError: asleep.
        """
        if self.asleep:
            raise RuntimeError(f"{self._what} sleeps; wake it first")

    @torch.no_grad()
    def sleep(self) -> None:
        """Move everything to main memory. What is in main memory already stays. A failure in between leaves each tensor either here
        or there, so that ``wake`` and ``sleep`` can still be called."""
        away = {id(tensor) for tensor, _ in self._moved}
        live = list(self._live())
        for tensor in live:
            if id(tensor) not in away:
                self._moved.append((tensor, tensor.device))
                tensor.data = tensor.data.to(HOST, copy=True)
        for storage, versions in self._leaving({id(tensor) for tensor in live}):
            copy = self._copies.get(storage._cdata)
            if copy is None or copy.size != storage.nbytes():
                copy = self._copies[storage._cdata] = _Copy(storage)
            copy.update(storage, versions)
            self._emptied.append(_Emptied(storage, copy))
            storage.resize_(0)
        # Of storages that are gone, and of those that stay.
        self._copies = {emptied.key: emptied.copy for emptied in self._emptied}
        release_cached_memory()

    def _leaving(self, live: set[int]) -> Iterator[tuple[torch.UntypedStorage, Versions]]:
        """The storages that are there and should go, each once."""
        done = {storage._cdata for storage, _ in _storages(self._stays())}
        for source, changes in (
            (self._frozen, False),
            *((source, True) for source in self._changing),
        ):
            for storage, versions in _storages(t for t in source() if id(t) not in live):
                if storage._cdata not in done:
                    done.add(storage._cdata)
                    yield storage, None if changes else versions

    @torch.no_grad()
    def wake(self) -> None:
        """Move everything back.

        Raises:
            RnowError: the card has no room. Calling it again continues.
        """
        try:
            while self._emptied:
                self._emptied[-1].fill()
                self._emptied.pop()
            while self._moved:
                tensor, device = self._moved[-1]
                tensor.data = tensor.data.to(device, copy=True)
                self._moved.pop()
        except torch.OutOfMemoryError as error:
            raise RnowError(
                f"there is no room for {self._what} on the card any more",
                title="Out of memory",
                why=str(error).partition("\n")[0],
                fix="lower sampler.gpu_memory_utilization, or end what else uses the card",
            ) from error


class _Copy:
    """What a storage holds, in main memory: pinned where possible, since that is several times as fast."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.size = storage.nbytes()
        self._bytes = host_bytes(self.size, pinned=storage.device.type == "cuda")
        self._versions: Versions = None
        # As long as this is held no other storage has its address.
        self._of = StorageWeakRef(storage)

    def update(self, storage: torch.UntypedStorage, versions: Versions) -> None:
        """Copy the storage, unless it is at the versions that were copied last."""
        if versions is None or versions != self._versions:
            self._versions = None
            self._bytes.copy_(_bytes_of(storage))
            self._versions = versions

    def write_to(self, storage: torch.UntypedStorage) -> None:
        """Fill the storage."""
        _bytes_of(storage).copy_(self._bytes)


class _Emptied:
    """A storage without bytes, and where they are."""

    def __init__(self, storage: torch.UntypedStorage, copy: _Copy) -> None:
        self._storage = storage
        self.copy = copy

    @property
    def key(self) -> int:
        return self._storage._cdata

    def fill(self) -> None:
        self._storage.resize_(self.copy.size)
        self.copy.write_to(self._storage)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a frozen model consists of, what quantisation adds included. Some come more than once."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
                yield from _attached(tensor)
        yield from _attached(module)


def release_cached_memory() -> None:
    """Give what torch holds unused back to the card, where another process can take it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _attached(owner: object) -> Iterator[Tensor]:
    for name in _ATTACHED:
        value = vars(owner).get(name) if hasattr(owner, "__dict__") else None
        if isinstance(value, Tensor):
            yield value
        elif value is not None and type(value).__module__.startswith("bitsandbytes"):
            yield from _attached(value)


def _storages(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, Versions]]:
    """The storages behind ``tensors``, each once. Those that cannot be emptied (a file mapped into memory) and those without
    bytes (moved away before, or of torch's meta device) are left out."""
    found: dict[int, tuple[torch.UntypedStorage, list[int | None]]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" or not storage.nbytes() or not storage.resizable():
            continue
        versions = found.setdefault(storage._cdata, (storage, []))[1]
        versions.append(None if tensor.is_inference() else tensor._version)
    return [
        (storage, None if None in versions else tuple(v for v in versions if v is not None))
        for storage, versions in found.values()
    ]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def host_bytes(size: int, *, pinned: bool) -> Tensor:
    """A buffer in main memory, locked there where that is asked for and allowed."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the machine lets us lock no more memory
            pass
    return torch.empty(size, dtype=torch.uint8)
