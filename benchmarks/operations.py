"""What a piece of work does, by counting: calls into torch, floating-point operations, bytes read and written.

Nothing here looks at a clock. A call counts once for each kernel that torch is asked for, in the forward and in the backward pass;
what only makes a view of a tensor, or a tensor without content, is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["products", "attention", "passes"]
"""Matrix products; fused attention kernels; everything else, which costs memory traffic and little arithmetic."""

_FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "resize_"}  # fmt: skip
_PICKING = {"embedding", "index", "gather", "index_select", "_embedding_bag", "_embedding_bag_forward_only", "take_along_dim"}  # fmt: skip
"""They read as much of their first argument as they write, and not all of it."""
_PUTTING = {"index_put_", "_index_put_impl_", "scatter_", "index_copy_", "scatter", "index_add_", "index_put"}  # fmt: skip
"""They write as much of their first argument as they are given."""


@dataclass(slots=True)
class Work:
    """Sums over calls of one kind. ``streamed``: of the bytes, those of calls on more than a cache holds."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    streamed: float = 0.0
    least_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of this machine: FLOP/s of a large product, bytes/s of a copy within the cache and of one beyond it."""

    product: float
    cached: float
    streamed: float


CACHE_BYTES = 8 * 2**20


class Count(TorchDispatchMode):
    """Counts the work of the block, of this thread. With ``rates`` also the seconds that it takes at least: for each call its
    arithmetic at the rate of products or its bytes at the rate of copies, whichever is longer."""

    def __init__(self, rates: Rates | None = None) -> None:
        super().__init__()
        self.rates = rates
        self.found: dict[Kind, Work] = {}
        self.by_name: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if _kind(name) == "passes" and func not in _UNDECOMPOSED:
            with self:  # without autograd, operations that are made of others come whole
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            _UNDECOMPOSED.add(func)
        result = func(*args, **kwargs)
        if name not in _FREE and not _makes_view(func):
            self._add(name, _named(func, args, kwargs), func, result)
        return result

    def _add(self, name: str, given: Mapping[str, Any], func: Any, result: Any) -> None:
        flops = _flops(name, given, result)
        moved = _bytes(name, given, func, result)
        streams = moved > CACHE_BYTES
        seconds = 0.0
        if self.rates:
            copying = moved / (self.rates.streamed if streams else self.rates.cached)
            seconds = max(flops / self.rates.product, copying)
        for work in (
            self.found.setdefault(_kind(name), Work()),
            self.by_name.setdefault(name, Work()),
        ):
            work.calls += 1
            work.flops += flops
            work.bytes += moved
            work.streamed += moved if streams else 0
            work.least_seconds += seconds

    @property
    def total(self) -> Work:
        """Over all kinds."""
        works = self.found.values()
        return Work(
            calls=sum(work.calls for work in works),
            flops=sum(work.flops for work in works),
            bytes=sum(work.bytes for work in works),
            streamed=sum(work.streamed for work in works),
            least_seconds=sum(work.least_seconds for work in works),
        )


_UNDECOMPOSED: set[Any] = set()
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addmv", "mv", "_int_mm", "_linear_pointwise"}  # fmt: skip
"""The last is oneDNN's, whose first argument is ``X``."""


def _kind(name: str) -> Kind:
    if name in _PRODUCTS:
        return "products"
    return "attention" if "attention" in name else "passes"


def _makes_view(func: Any) -> bool:
    returns = [value.alias_info for value in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _named(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _flops(name: str, given: Mapping[str, Any], result: Any) -> float:
    """A multiplication and an addition are two. A causal kernel computes half of its square; a backward one five products for
    the forward one's two."""
    kind = _kind(name)
    if kind == "products":
        left = next(given[key] for key in ("mat1", "batch1", "X", "self") if key in given)
        return 2.0 * result.numel() * left.shape[-1]
    if kind == "attention":
        query, key, value = given["query"], given["key"], given["value"]
        pairs = query.shape[:-1].numel() * key.shape[-2] * (0.5 if given.get("is_causal") else 1.0)
        forward = 2.0 * pairs * (query.shape[-1] + value.shape[-1])
        return forward * (2.5 if name.endswith("backward") else 1.0)
    return 0.0


def _bytes(name: str, given: Mapping[str, Any], func: Any, result: Any) -> float:
    written = sum(map(_size, _tensors(result)))
    if name in _PICKING:
        return 2 * written + sum(map(_size, _tensors(given.get("indices", given.get("index")))))
    if name in _PUTTING:
        values = given.get("values", given.get("src", given.get("source", given.get("value"))))
        return 2 * sum(map(_size, _tensors(values)))
    reads = 0.0
    for argument in func._schema.arguments:
        only_written = argument.alias_info is not None and argument.alias_info.is_write
        if only_written and (argument.kwarg_only or name in ("copy_", "fill_", "zero_")):
            continue
        reads += sum(map(_size, _tensors(given.get(argument.name))))
    in_place = written or sum(
        _size(tensor)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(given.get(argument.name))
    )
    return reads + in_place


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _size(tensor: Tensor) -> float:
    """Bytes of memory that it covers: what is only expanded counts once."""
    sizes = (s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0
