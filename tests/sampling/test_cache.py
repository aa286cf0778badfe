"""The cache that is written in place holds what transformers' own holds, and copies each token a bounded number of times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.families import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rnow.sampling.cache import (
    SMALLEST,
    GrowingLayer,
    GrowingWindowLayer,
    _in_place,
    build_cache,
)

HEADS, WIDTH = 2, 3


def pair(window: int | None, limit: int) -> tuple[Any, Any]:
    """transformers' layer and ours."""
    its = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    return its, _in_place(its, limit)


def states(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (2, rows, count, HEADS, WIDTH)
    # A view, as projections give it: not contiguous along the tokens.
    keys, values = torch.randn(shape, generator=generator).transpose(2, 3)
    return keys, values


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([None, 2, 5, 70]),
    prompt=st.integers(1, 90),
    steps=st.lists(
        st.one_of(st.integers(1, 40), st.lists(st.integers(0, 99), min_size=1, max_size=5)),
        max_size=12,
    ),
)
def test_it_holds_what_transformers_holds(
    window: int | None, prompt: int, steps: list[int | list[int]]
) -> None:
    """A prompt, then numbers of tokens to add and lists of rows to keep."""
    length = prompt + sum(step for step in steps if isinstance(step, int))
    its, ours = pair(window, length)
    generator = torch.Generator().manual_seed(prompt)
    rows = 3
    for step in [prompt, *steps]:
        if isinstance(step, int):
            given_states = states(rows, step, generator)
            for expected, found in zip(
                its.update(*given_states), ours.update(*given_states), strict=True
            ):
                assert torch.equal(found, expected)
        else:
            kept = torch.tensor(step) % rows
            rows = len(step)
            its.reorder_cache(kept)
            ours.reorder_cache(kept)
        assert torch.equal(ours.keys, its.keys)
        assert torch.equal(ours.values, its.values)
        assert ours.get_seq_length() == its.get_seq_length()
        assert ours.get_mask_sizes(1) == its.get_mask_sizes(1)
        assert ours.is_sliding == its.is_sliding
        for run in ours._runs:
            assert run._room.shape[2] <= max(length, run.used.shape[2])


class Written(TorchDispatchMode):
    """Elements that copies have written."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.startswith(("copy_", "cat", "clone")):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("window", [None, 50])
def test_tokens_are_copied_a_bounded_number_of_times(window: int | None) -> None:
    tokens = 300
    its, ours = pair(window, limit=10 * tokens)
    written = []
    for layer in (its, ours):
        generator = torch.Generator().manual_seed(0)
        with Written() as copies:
            for _ in range(tokens):
                layer.update(*states(1, 1, generator))
        written.append(copies.elements / (2 * HEADS * WIDTH))
    assert written[0] > 20 * tokens, "what this saves"
    assert written[1] <= 3 * tokens
    if window is not None:
        assert ours._runs[0]._room.shape[2] <= max(SMALLEST, 2 * window)


def test_no_room_is_made_beyond_the_limit() -> None:
    layer = GrowingLayer(limit=100)
    layer.update(*states(4, 80, torch.Generator()))
    assert layer._runs[0]._room.shape[2] == 100
    before = layer._runs[0]._room.data_ptr()
    for _ in range(20):
        layer.update(*states(4, 1, torch.Generator()))
    assert layer._runs[0]._room.data_ptr() == before
    layer.reorder_cache(torch.tensor([2]))
    assert layer._runs[0]._room.shape == (1, HEADS, 100, WIDTH), "rows that left are let go"


def test_only_plain_layers_are_replaced() -> None:
    kinds = {
        family: [type(layer) for layer in build_cache(tiny_config(family), 32).layers]
        for family in ("qwen3", "gemma2", "qwen3_next", "falcon_h1")
    }
    assert set(kinds["qwen3"]) == {GrowingLayer}
    assert set(kinds["gemma2"]) == {GrowingWindowLayer, GrowingLayer}
    hybrid = [type(layer) for layer in DynamicCache(config=tiny_config("qwen3_next")).layers]
    assert kinds["qwen3_next"] == [GrowingLayer if k is DynamicLayer else k for k in hybrid]
    assert GrowingLayer in kinds["qwen3_next"]
    assert len(set(hybrid)) == 2
    assert GrowingLayer not in kinds["falcon_h1"]


def test_layers_that_are_made_on_the_way_are_in_place_too() -> None:
    cache = build_cache(None, 8)
    cache.update(*states(1, 2, torch.Generator()), 1)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, GrowingLayer]
