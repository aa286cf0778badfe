"""Drawing one id: inverting a cumulative distribution, at its edges too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnow.sampling.decode import draw
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
