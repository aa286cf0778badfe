"""Drawing one id: inverting a cumulative distribution, at its edges too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnow.sampling.decode import BLOCK, UNBLOCKED, draw, uniforms
from rnow.types import SamplingParams

PLAIN = SamplingParams(max_tokens=1, stop_token_ids=())
ALMOST_ONE = math.nextafter(1.0, 0.0)


def draw_one(logits: list[float], uniform: float, **changes: float) -> tuple[int, float]:
    params = SamplingParams(max_tokens=1, stop_token_ids=(), **changes)  # type: ignore[arg-type]
    ids, logprobs = draw(
        torch.tensor([logits]), params, torch.tensor([uniform], dtype=torch.float64)
    )
    return int(ids[0]), float(logprobs[0])


def test_intervals_have_the_width_of_the_probabilities() -> None:
    logits = [math.log(0.2), math.log(0.5), math.log(0.3)]
    assert [draw_one(logits, u)[0] for u in (0.0, 0.19, 0.21, 0.69, 0.71, ALMOST_ONE)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_an_impossible_id_is_never_drawn(uniform: float) -> None:
    forbidden = float("-inf")
    chosen, logprob = draw_one([forbidden, 0.0, forbidden, 0.0, forbidden], uniform)
    assert chosen in (1, 3)
    assert logprob == pytest.approx(math.log(0.5))


def test_an_id_that_underflows_is_never_drawn() -> None:
    assert draw_one([-900.0, 0.0, -900.0], 0.0)[0] == 1
    assert draw_one([-900.0, 0.0, -900.0], ALMOST_ONE)[0] == 1


def test_top_k_one_is_greedy() -> None:
    assert draw_one([0.0, 2.0, 1.0], 0.999, top_k=1) == (1, 0.0)


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    assert draw_one([0.0, 2.0, 1.0], 0.999, top_p=1e-9) == (1, 0.0)


def test_greedy_reports_the_untempered_logprob() -> None:
    chosen, logprob = draw_one([0.0, math.log(3.0)], 0.0, temperature=0.0)
    assert chosen == 1
    assert logprob == pytest.approx(math.log(0.75))


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=12),
    uniform=st.floats(0, ALMOST_ONE),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 1.0),
)
def test_what_is_drawn_can_be_drawn(
    logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    chosen, logprob = draw_one(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    assert 0 <= chosen < len(logits)
    assert math.isfinite(logprob)
    assert logprob <= 1e-6
    untruncated = torch.log_softmax(torch.tensor(logits) / temperature, dim=0)[chosen].item()
    assert logprob >= untruncated - 1e-4, "cutting others away only makes an id likelier"


WIDE = UNBLOCKED + 3 * BLOCK + 7


def wide_logits(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, WIDE, generator=torch.Generator().manual_seed(0))


def test_a_large_vocabulary_is_drawn_as_one_cumulative_sum_would() -> None:
    rows = 2000
    logits = wide_logits(1).expand(rows, -1)
    stream = torch.from_numpy(uniforms(7, 0, rows))
    ids, logprobs = draw(logits, PLAIN, stream)
    exact = torch.log_softmax(logits[0].double(), dim=0)
    cumulative = exact.exp().cumsum(0)
    torch.testing.assert_close(logprobs.double(), exact[ids], atol=1e-5, rtol=0)
    # float32 probabilities move the bounds between ids by this at most, so hardly a draw falls on the other side of one
    low, high = cumulative[ids] - exact[ids].exp(), cumulative[ids]
    assert (low - 1e-7 <= stream).all()
    assert (stream <= high + 1e-7).all()
    assert (ids != torch.searchsorted(cumulative, stream, right=True)).sum() <= 3
    assert len({int(i) // BLOCK for i in ids}) > 8


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999, ALMOST_ONE])
@pytest.mark.parametrize("possible", [0, BLOCK - 1, BLOCK, 3 * BLOCK + 5, WIDE - 1])
def test_in_a_large_vocabulary_only_the_possible_is_drawn(possible: int, uniform: float) -> None:
    logits = torch.full((WIDE,), float("-inf"))
    logits[possible] = 1.0
    assert draw_one(logits.tolist(), uniform) == (possible, 0.0)
    logits[WIDE // 2] = 1.0
    chosen, logprob = draw_one(logits.tolist(), uniform)
    assert chosen == sorted((possible, WIDE // 2))[int(uniform >= 0.5)]
    assert logprob == pytest.approx(math.log(0.5))


@settings(max_examples=50, deadline=None)
@given(
    ids=st.sets(st.integers(0, WIDE - 1), min_size=1, max_size=6),
    uniform=st.floats(0, ALMOST_ONE),
    spread=st.floats(0, 80),
)
def test_the_edges_of_blocks_are_no_edges(ids: set[int], uniform: float, spread: float) -> None:
    logits = torch.full((1, WIDE), float("-inf"))
    logits[0, list(ids)] = torch.linspace(-spread, spread, len(ids))
    chosen, logprob = draw(logits, PLAIN, torch.tensor([uniform], dtype=torch.float64))
    assert int(chosen) in ids
    assert math.isfinite(float(logprob))
