"""Grouped queries under a mask: the numbers of transformers' own function and of a naive reference, and no repeated keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.families import VOCABULARY, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rnow.models import attention
from rnow.models.attention import (
    _folds,
    capped_attention,
    fold_heads,
    grouped_attention,
    register_grouped_attention,
)
from rnow.models.loading import load_causal_lm

ROWS, KV_HEADS, GROUPS, WIDTH, KEYS = 3, 2, 3, 8, 11
SCALING = 0.3
MODULE: Any = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=True)


def tensors(queries: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(KV_HEADS * GROUPS, queries), (KV_HEADS, KEYS), (KV_HEADS, KEYS)]
    return [
        torch.randn(ROWS, heads, length, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for heads, length in shapes
    ]


def seen(queries: int, heads: int = 1) -> Tensor:
    """Rows padded on the left by 0, 2 and 4 keys; each head looks one key less far back, though every query sees itself."""
    keys, query = torch.arange(KEYS), torch.arange(KEYS - queries, KEYS)
    causal = keys[None, :] <= query[:, None]
    first = torch.tensor([0, 2, 4])[:, None] + torch.arange(heads)[None, :]
    return causal & (keys >= first[:, :, None, None]) | (keys == query[:, None])


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (tensor.repeat_interleave(GROUPS, dim=1) for tensor in (key, value))
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) * SCALING
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("bhts,bhsd->bthd", weights, value)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return grouped_attention(MODULE, query, key, value, mask, scaling=SCALING)[0]


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return fold_heads(query, key, value, mask, scaling=SCALING).transpose(1, 2)


def gradients(way: Callable[..., Tensor], queries: int, heads: int) -> list[Tensor]:
    given = tensors(queries)
    output = way(*given, seen(queries, heads))
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in given if tensor.grad is not None)]


@pytest.mark.parametrize("way", [ours, folded])
@pytest.mark.parametrize("queries", [1, 4, KEYS])
@pytest.mark.parametrize("heads", [1, KV_HEADS * GROUPS])
def test_values_and_gradients_are_the_reference(
    way: Callable[..., Tensor], queries: int, heads: int
) -> None:
    found, expected = gradients(way, queries, heads), gradients(naive, queries, heads)
    assert len(found) == len(expected) == 4
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 4])
def test_on_the_cpu_the_bits_are_transformers_own(queries: int) -> None:
    query, key, value = tensors(queries, torch.float32)
    for mask in (None, seen(queries), torch.where(seen(queries), 0.0, -1e9)):
        expected, _ = sdpa_attention_forward(MODULE, query, key, value, mask, scaling=SCALING)
        found, _ = grouped_attention(MODULE, query, key, value, mask, scaling=SCALING)
        assert torch.equal(found, expected)


def test_folding_is_chosen_where_it_copies_less() -> None:
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    key = torch.zeros(2, KV_HEADS, 64, WIDTH)

    def folds(queries: int) -> bool:
        query = torch.zeros(2, KV_HEADS * GROUPS, queries, WIDTH)
        return _folds(query, key, key, mask.expand(2, 1, queries, 64))

    # keys and values of 2 x 2 heads x 8 numbers per key against one number per query
    assert [folds(n) for n in (1, 2, 32, 33)] == [True, True, True, False]


CAP = 1.5


def naive_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (tensor.repeat_interleave(GROUPS, dim=1) for tensor in (key, value))
    scores = CAP * torch.tanh(torch.einsum("bhtd,bhsd->bhts", query, key) * SCALING / CAP)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("bhts,bhsd->bthd", weights, value)


def capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return grouped_attention(MODULE, query, key, value, mask, scaling=SCALING, softcap=CAP)[0]


@pytest.mark.parametrize("room", [1, 2**20])
@pytest.mark.parametrize("queries", [1, 4, KEYS])
@pytest.mark.parametrize("heads", [1, KV_HEADS * GROUPS])
def test_squashed_scores_are_the_reference(
    queries: int, heads: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_CAPPED_BYTES", room)  # 1: one query at a time
    found, expected = (gradients(way, queries, heads) for way in (capped, naive_capped))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=0)


def test_squashed_scores_without_a_mask_are_causal_and_with_numbers_added_too() -> None:
    query, key, value = tensors(KEYS)
    causal = torch.ones(KEYS, KEYS, dtype=torch.bool).tril().expand(ROWS, 1, -1, -1)
    expected = naive_capped(query, key, value, causal)
    for mask in (None, torch.where(causal, 0.0, -1e9).double()):
        torch.testing.assert_close(capped(query, key, value, mask), expected, atol=1e-12, rtol=0)
    whole = capped_attention(query, key, value, None, softcap=CAP, scaling=SCALING, causal=False)
    everything = torch.ones_like(causal)
    torch.testing.assert_close(
        whole.transpose(1, 2), naive_capped(query, key, value, everything), atol=1e-12, rtol=0
    )


def test_a_query_that_sees_nothing_is_still_a_number() -> None:
    query, key, value = tensors(KEYS)
    mask = torch.zeros(ROWS, 1, KEYS, KEYS, dtype=torch.bool)
    assert capped(query, key, value, mask).isfinite().all()


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_a_model_that_squashes_its_scores_is_computed_so(family: str, tmp_path: Path) -> None:
    """Whatever kernel: transformers' own sdpa would leave it out."""
    tiny_model(family, attn_logit_softcapping=1.0).save_pretrained(tmp_path)
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def states(kernel: str | None) -> Tensor:
        lm = load_causal_lm(
            tmp_path,
            vocabulary=VOCABULARY,
            dtype=torch.float32,
            device=torch.device("cpu"),
            attn_implementation=kernel,
        )
        assert lm.model.config._attn_implementation == (kernel or "sdpa")
        return lm.body(input_ids=ids, attention_mask=mask).last_hidden_state[:, 5:]

    found, expected = states(None), states("eager")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    try:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        left_out = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 5:]
    finally:
        register_grouped_attention()
    assert (left_out - expected).abs().max() > 1e-3, "the cap changes nothing here"


class Copies(TorchDispatchMode):
    """Elements of the largest tensor that any operation but attention makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func.__name__.startswith(("clone", "copy", "_to_copy")):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("way", [ours, folded])
def test_keys_are_not_repeated_for_one_query(way: Callable[..., Tensor]) -> None:
    query, key, value = (tensor.detach().float() for tensor in tensors(1))
    with Copies() as copies, torch.no_grad():
        way(query, key, value, seen(1))
    assert copies.largest <= query.numel()
    with Copies() as copies, torch.no_grad():
        sdpa_attention_forward(MODULE, query, key, value, seen(1), scaling=SCALING)
    assert copies.largest == GROUPS * key.numel(), "what this saves"


def test_it_stands_in_for_sdpa_in_what_is_loaded(tmp_path: Path) -> None:
    tiny_model("qwen3", num_key_value_heads=1).save_pretrained(tmp_path)
    lm = load_causal_lm(
        tmp_path, vocabulary=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
    )
    assert lm.model.config._attn_implementation == "sdpa"
    assert AttentionInterface()["sdpa"] is grouped_attention
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = lm.body(input_ids=ids, attention_mask=mask).last_hidden_state
    try:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        expected = lm.body(input_ids=ids, attention_mask=mask).last_hidden_state
    finally:
        register_grouped_attention()
    assert torch.equal(found, expected)
