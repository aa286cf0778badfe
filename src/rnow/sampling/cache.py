"""A key/value cache that is written in place: transformers' own copies all of itself for every token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SMALLEST = 64


def build_cache(config: Any, limit: int) -> DynamicCache:
    """An empty cache for a body with this config.

    Layers of attention, full or over a window, are written in place. What else a family keeps (states of Mamba, the keys
    of an indexer) stays as transformers has it.

    Args:
        limit: no sequence will be longer, in tokens; no room is made beyond it.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_in_place(layer, limit) for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(GrowingLayer, limit)  # type: ignore[assignment]
    return cache


def _in_place(layer: Any, limit: int) -> Any:
    if type(layer) is DynamicLayer:
        return GrowingLayer(limit)
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingWindowLayer(limit, layer.sliding_window)
    return layer


class _Run:
    """The stretch of a tensor ``[B, heads, room, D]`` that is in use; it grows at its end and may lose its front."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room: Tensor | None = None
        self._start = self._end = 0

    @property
    def used(self) -> Tensor:
        """``[B, heads, length, D]``, a view."""
        assert self._room is not None, "nothing was written yet"
        return self._room[:, :, self._start : self._end]

    def append(self, new: Tensor) -> Tensor:
        """Write ``[B, heads, T, D]`` behind what there is; returns all of it."""
        count = new.shape[2]
        if self._room is None:
            self._room = self._make_room(new, count)
        elif self._end + count > self._room.shape[2]:
            used = self.used
            self._room = self._make_room(new, used.shape[2] + count)
            self._start, self._end = 0, used.shape[2]
            self.used.copy_(used)
        self._room[:, :, self._end : self._end + count] = new
        self._end += count
        return self.used

    def keep_last(self, count: int) -> Tensor:
        """Forget all but the last ``count``; returns those."""
        self._start = max(self._start, self._end - count)
        return self.used

    def select_rows(self, rows: Tensor) -> Tensor:
        """Make these the rows; returns what is used of them."""
        used = self.used
        rows = rows.to(used.device)
        self._room = self._make_room(used, self._end - self._start, rows=rows.numel())
        self._start, self._end = 0, used.shape[2]
        torch.index_select(used, 0, rows, out=self.used)
        return self.used

    def _make_room(self, like: Tensor, length: int, *, rows: int | None = None) -> Tensor:
        """Room for ``length`` and as much again: so the copies of a whole sequence stay below twice its length."""
        room = max(length, min(self._limit, max(SMALLEST, 2 * length)))
        return like.new_empty(rows or like.shape[0], like.shape[1], room, like.shape[3])


class _InPlace:
    """What both kinds of layers share; ``keys`` and ``values`` are views of what is used."""

    keys: Tensor | None
    values: Tensor | None

    def _begin(self, limit: int) -> None:
        self._runs = (_Run(limit), _Run(limit))

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._runs[0].append(keys), self._runs[1].append(values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        if self.keys is not None and self.keys.numel():
            self.keys, self.values = (run.select_rows(beam_idx) for run in self._runs)


class GrowingLayer(_InPlace, DynamicLayer):
    """Keys and values of full attention."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._begin(limit)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add ``[B, heads, T, D]``; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append(key_states, value_states)
        return self.keys, self.values


class GrowingWindowLayer(_InPlace, DynamicSlidingWindowLayer):
    """Keys and values of attention over a sliding window: what has left it makes room once in a window."""

    def __init__(self, limit: int, window: int) -> None:
        super().__init__(sliding_window=window)
        self._begin(limit)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add ``[B, heads, T, D]``; returns them behind the keys and values that their first may still see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        seen = self._append(key_states, value_states)
        self.keys, self.values = (run.keep_last(self.sliding_window - 1) for run in self._runs)
        return seen
