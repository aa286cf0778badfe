"""Moving a model out of a card and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from rnow.errors import RnowError

HOST = torch.device("cpu")

# Where bitsandbytes keeps what belongs to a quantised weight, besides the weight itself.
_ATTACHED = ("quant_state", "state2", "state", "absmax", "code", "offset", "CB", "SCB")

Tensors = Callable[[], Iterable[Tensor]]


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
        self._frozen = [frozen]
        self._stays = stays
        self._live = live
        self._what = what
        self._emptied: list[_Emptied] = []
        self._moved: list[tuple[Tensor, torch.device]] = []

    @property
    def asleep(self) -> bool:
        """Whether anything is away from where it belongs."""
        return bool(self._emptied or self._moved)

    def take_along(self, frozen: Tensors) -> None:
        """Move these too from now on."""
        self._frozen.append(frozen)

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
        known = set(map(id, live))
        frozen = (
            tensor for source in self._frozen for tensor in source() if id(tensor) not in known
        )
        staying = {storage.data_ptr() for storage in _storages(self._stays())}
        for storage in _storages(frozen):
            if storage.data_ptr() in staying:
                continue
            self._emptied.append(_Emptied(storage))
            self._emptied[-1].empty()
        release_cached_memory()

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


class _Emptied:
    """A storage and its copy in main memory: pinned where possible, since that is several times as fast."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._size = storage.nbytes()
        self._copy = host_bytes(self._size, pinned=storage.device.type == "cuda")
        self._copy.copy_(_bytes_of(storage))

    def empty(self) -> None:
        self._storage.resize_(0)

    def fill(self) -> None:
        self._storage.resize_(self._size)
        _bytes_of(self._storage).copy_(self._copy)


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


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The storages behind ``tensors``, each once. Those that cannot be emptied (a file mapped into memory) and those without
    bytes (moved away before, or of torch's meta device) are left out."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type != "meta" and storage.nbytes() and storage.resizable():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


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
