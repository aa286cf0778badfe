"""The likeliest tokens, chunk by chunk, against a full softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rnow.algorithm.head import Head, Tiling
from rnow.algorithm.records import TopKEvidence
from rnow.algorithm.topk import TopLogprobs, top_logprobs

ROWS, HIDDEN, VOCABULARY, PADDED = 9, 5, 13, 16


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 1.5)])
def test_values_and_order(k: int, tile: int, temperature: float, softcap: float | None) -> None:
    hidden, weight, targets = tensors()
    head = Head(weight=weight[:VOCABULARY], softcap=softcap)
    found = top_logprobs(
        hidden, head, targets, k, temperature=temperature, tiling=Tiling(rows=tile, width=tile)
    )
    logits = hidden @ weight[:VOCABULARY].T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    table = torch.log_softmax(logits / temperature, dim=-1)
    expected = table.sort(dim=-1, descending=True)
    assert torch.equal(found.ids, expected.indices[:, :k])
    torch.testing.assert_close(found.logprobs, expected.values[:, :k])
    torch.testing.assert_close(found.selected, table.gather(1, targets[:, None]).squeeze(1))
    assert not found.logprobs.requires_grad


@pytest.mark.parametrize("k", [1, 20, 64, 3001])
@pytest.mark.parametrize("width", [331, 1024, 4000])
def test_of_many_tokens_the_likeliest_are_found(k: int, width: int) -> None:
    generator = torch.Generator().manual_seed(k)
    hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3001, 6, generator=generator, dtype=torch.float64)
    weight[2990:] *= 3  # the last groups, which a tile does not fill
    bias = torch.randn(3001, generator=generator, dtype=torch.float64)
    head = Head(weight=weight, bias=bias, scale=0.5)
    found = top_logprobs(
        hidden, head, torch.zeros(7, dtype=torch.long), k, tiling=Tiling(rows=3, width=width)
    )
    expected = torch.log_softmax(head.logits(hidden), -1).topk(k, dim=-1)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.logprobs, expected.values)


def test_half_precision_is_normalised_in_float32() -> None:
    hidden, weight, targets = tensors(torch.bfloat16)
    found = top_logprobs(hidden, Head(weight=weight), targets, PADDED)
    assert found.logprobs.dtype == found.selected.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.exp().sum(-1), torch.ones(ROWS))


def test_no_rows() -> None:
    _, weight, _ = tensors()
    found = top_logprobs(
        torch.zeros(0, HIDDEN, dtype=torch.float64),
        Head(weight=weight),
        torch.zeros(0, dtype=torch.long),
        3,
    )
    assert isinstance(found, TopLogprobs)
    assert found.ids.shape == found.logprobs.shape == (0, 3)
    assert found.selected.shape == (0,)


@pytest.mark.parametrize("k", [0, -1, VOCABULARY + 1])
def test_a_k_that_cannot_be(k: int) -> None:
    hidden, weight, targets = tensors()
    with pytest.raises(ValueError, match="13 ids of the head"):
        top_logprobs(hidden, Head(weight=weight[:VOCABULARY]), targets, k)


def test_the_tail_is_what_the_k_leave_and_never_negative() -> None:
    logprobs = torch.tensor([[0.5, 0.25], [1.0, 1e-9], [0.9, 0.1]]).log()
    evidence = TopKEvidence(
        teacher_logprobs=torch.zeros(3), ids=torch.zeros(3, 2, dtype=torch.long), logprobs=logprobs
    )
    assert evidence.tail().tolist() == pytest.approx([0.25, 0.0, 0.0], abs=1e-6)
    assert (evidence.tail() >= 0).all()
