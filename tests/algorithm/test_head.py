"""The chunked head against a full softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.algorithm import reference
from torch import Tensor

from rnow.algorithm import head as head_module
from rnow.algorithm.head import Head, Tiling, selected_logprobs, tiling_for

ROWS, HIDDEN, PADDED, VOCABULARY = 9, 5, 16, 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "scale": Case(scale=0.25),
    "softcap": Case(softcap=1.5),
    "hot": Case(temperature=1.7),
    "cold": Case(temperature=0.3),
    "everything": Case(bias=True, scale=1.6, softcap=2.0, temperature=0.7),
}


def _tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    targets[0], targets[1] = 0, VOCABULARY - 1
    return normal(ROWS, HIDDEN), normal(PADDED, HIDDEN), normal(PADDED), targets


def _head(case: Case, weight: Tensor, bias: Tensor) -> Head:
    return Head(
        weight=weight[:VOCABULARY],
        bias=bias[:VOCABULARY] if case.bias else None,
        scale=case.scale,
        softcap=case.softcap,
    )


def _naive(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.logits(
        hidden,
        weight,
        bias if case.bias else None,
        scale=case.scale,
        softcap=case.softcap,
        temperature=case.temperature,
        vocabulary=VOCABULARY,
    )


@pytest.mark.parametrize("tile", [1, 2, 4, ROWS, 100, None])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_entropy_and_gradient_are_those_of_a_full_softmax(
    case: Case, tile: int | None
) -> None:
    hidden, weight, bias, targets = _tensors()
    # A padded row with a huge logit: it must not take a share of the probability.
    weight[VOCABULARY:] *= 50
    ours = hidden.clone().requires_grad_(True)
    naive = hidden.clone().requires_grad_(True)
    upstream = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)

    found = selected_logprobs(
        ours,
        _head(case, weight, bias),
        targets,
        temperature=case.temperature,
        tiling=None if tile is None else Tiling(rows=tile, width=tile),
    )
    values = _naive(case, naive, weight, bias)
    expected = reference.log_softmax(values).gather(1, targets[:, None]).squeeze(1)
    (found.logprobs * upstream).sum().backward()
    (expected * upstream).sum().backward()

    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, reference.entropy(values), rtol=1e-10, atol=1e-10)
    assert ours.grad is not None
    assert naive.grad is not None
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-10, atol=1e-10)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradcheck(case: Case) -> None:
    hidden, weight, bias, targets = _tensors(seed=1)
    head = _head(case, weight, bias)

    def logprobs(values: Tensor) -> Tensor:
        return selected_logprobs(
            values, head, targets, temperature=case.temperature, tiling=Tiling(rows=4, width=5)
        ).logprobs

    assert torch.autograd.gradcheck(logprobs, (hidden.requires_grad_(True),))


def test_probabilities_of_all_real_ids_sum_to_one() -> None:
    hidden, weight, bias, _ = _tensors()
    head = _head(CASES["everything"], weight, bias)
    every = torch.arange(VOCABULARY)
    for row in hidden:
        found = selected_logprobs(row.expand(VOCABULARY, -1), head, every, temperature=0.7)
        assert found.logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_logits_so_large_that_exp_overflows() -> None:
    hidden, weight, _, targets = _tensors()
    hidden = (hidden * 1e4).requires_grad_(True)
    found = selected_logprobs(hidden, Head(weight=weight[:VOCABULARY]), targets)
    found.logprobs.sum().backward()
    assert torch.isfinite(found.logprobs).all()
    assert torch.isfinite(found.entropy).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_the_entropy_carries_no_gradient() -> None:
    hidden, weight, _, targets = _tensors()
    found = selected_logprobs(
        hidden.requires_grad_(True), Head(weight=weight[:VOCABULARY]), targets
    )
    assert found.logprobs.requires_grad
    assert not found.entropy.requires_grad


def test_no_rows() -> None:
    _, weight, _, _ = _tensors()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    found = selected_logprobs(
        hidden, Head(weight=weight[:VOCABULARY]), torch.zeros(0, dtype=torch.long)
    )
    assert found.logprobs.shape == found.entropy.shape == (0,)
    found.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


def test_half_precision_weights_are_normalised_in_float32() -> None:
    hidden, weight, _, targets = _tensors()
    hidden16 = hidden.to(torch.bfloat16).requires_grad_(True)
    head = Head(weight=weight[:VOCABULARY].to(torch.bfloat16))
    found = selected_logprobs(hidden16, head, targets, tiling=Tiling(rows=2, width=VOCABULARY))
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    # What is exact given bfloat16 logits: a log-softmax in float32 on top of them.
    expected = torch.log_softmax(head.logits(hidden16.detach()).double(), -1)
    torch.testing.assert_close(
        found.logprobs.detach().double(),
        expected.gather(1, targets[:, None]).squeeze(1),
        rtol=1e-6,
        atol=1e-6,
    )
    found.logprobs.sum().backward()
    assert hidden16.grad is not None
    assert hidden16.grad.dtype == torch.bfloat16


def test_each_logit_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = Head.logits

    def counting(self: Head, hidden: Tensor, columns: slice) -> Any:
        seen.append((hidden.shape[0], columns.stop - columns.start))
        return original(self, hidden, columns)

    monkeypatch.setattr(Head, "logits", counting)
    hidden, weight, _, targets = _tensors()
    found = selected_logprobs(
        hidden.requires_grad_(True),
        Head(weight=weight[:VOCABULARY]),
        targets,
        tiling=Tiling(rows=4, width=8),
    )
    found.logprobs.sum().backward()
    # The backward pass does not come back to it.
    assert seen == [(rows, width) for rows in (4, 4, 1) for width in (8, 5)]


@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_several_tokens_of_a_row(case: Case, tile: int) -> None:
    hidden, weight, bias, targets = _tensors()
    several = torch.stack([targets, (targets + 3) % VOCABULARY, targets], 1)
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    upstream = torch.linspace(-1.0, 2.0, several.numel(), dtype=torch.float64).view(several.shape)
    found = selected_logprobs(
        ours,
        _head(case, weight, bias),
        several,
        temperature=case.temperature,
        entropy=False,
        tiling=Tiling(rows=tile, width=tile),
    )
    expected = reference.log_softmax(_naive(case, naive, weight, bias)).gather(1, several)
    (found.logprobs * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert found.entropy is None
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-10, atol=1e-10)


def test_float32_over_many_tiles_is_as_close_as_a_full_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator)
    weight = 2 * torch.randn(5000, 16, generator=generator)
    targets = torch.randint(5000, (40,), generator=generator)
    exact = torch.log_softmax((hidden.double() @ weight.double().T), -1)
    full = torch.log_softmax(hidden @ weight.T, -1)
    ours = hidden.clone().requires_grad_()
    found = selected_logprobs(ours, Head(weight=weight), targets, tiling=Tiling(rows=16, width=256))
    found.logprobs.sum().backward()
    chosen = exact.gather(1, targets[:, None])[:, 0]
    error = (found.logprobs.double() - chosen).abs().max()
    plain = (full.double().gather(1, targets[:, None])[:, 0] - chosen).abs().max()
    assert error <= max(2 * plain, torch.tensor(4e-6))
    gradient = weight.double()[targets] - exact.exp() @ weight.double()
    torch.testing.assert_close(ours.grad.double(), gradient, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_token_that_is_almost_certain() -> None:
    """1 - p is far below what float32 can tell from 1: the others' probabilities still say where to go."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 8, generator=generator)
    hidden = 12 * weight[:5]
    exact = torch.softmax(hidden.double() @ weight.double().T, -1)
    targets = exact.argmax(1)
    rest = exact.scatter(1, targets[:, None], 0.0)
    assert 0 < rest.sum(1).min() < 1e-8
    expected = rest.sum(1, keepdim=True) * weight.double()[targets] - rest @ weight.double()
    ours = hidden.clone().requires_grad_()
    found = selected_logprobs(ours, Head(weight=weight), targets, tiling=Tiling(rows=2, width=7))
    found.logprobs.sum().backward()
    assert ours.grad is not None
    error = (ours.grad.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-3


def test_a_tile_follows_neither_the_tokens_nor_the_vocabulary() -> None:
    threads = torch.get_num_threads()
    for vocabulary in (1_000, 151_936, 1_000_000):
        card = tiling_for(Head(weight=torch.empty(vocabulary, 1, device="meta")))
        assert card.rows * 4 * vocabulary <= max(head_module.GPU_BUFFER_BYTES, 64 * vocabulary)
        assert card.width == vocabulary
        head = Head(weight=torch.empty(1, 1).expand(vocabulary, 1))
        tiling, kept = tiling_for(head), tiling_for(head, kept=True)
        for found in (tiling, kept):
            held = found.rows * 4 * min(vocabulary, found.width)
            assert held <= head_module.CPU_TILE_BYTES * threads
            assert found.rows >= 16
        assert kept.rows * 4 * vocabulary <= max(head_module.CPU_BUFFER_BYTES, 64 * vocabulary)
