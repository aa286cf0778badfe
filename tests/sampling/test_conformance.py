"""What every Sampler must do: see ``tests/sampling/conformance.py``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tests.sampling.conformance import (
    CANDIDATES,
    STOP_IDS,
    VOCABULARY,
    Candidate,
    complete_all,
    params,
    prompt,
)

from rnow.protocols import Sampler
from rnow.types import Completion

MIXED = [(prompt(length, first), params(), 100 * length + first) for length, first in [
    (1, 3), (4, 5), (4, 9), (9, 5), (17, 5), (30, 8), (30, 8), (30, 9)
]]  # fmt: skip


@pytest.fixture(scope="module", params=CANDIDATES)
def candidate(
    request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]
) -> Iterator[Candidate]:
    candidate = request.param(tiny_model_dir)
    yield candidate
    candidate.close()


@pytest.fixture(scope="module")
def sampler(candidate: Candidate) -> Sampler:
    return candidate.make()


def test_is_a_sampler(sampler: Sampler) -> None:
    assert isinstance(sampler, Sampler)


def test_a_stop_id_ends_a_completion_and_belongs_to_it(sampler: Sampler) -> None:
    done = complete_all(sampler, [(prompt(6), params(max_tokens=40), seed) for seed in range(12)])
    reasons = {completion.finish_reason for completion in done}
    assert reasons == {"stop"}, "with 15 of 100 ids ending a turn, 40 tokens are enough"
    for completion in done:
        assert completion.token_ids[-1] in STOP_IDS
        assert not set(completion.token_ids[:-1]) & set(STOP_IDS)


def test_the_token_cap_cuts_and_says_so(sampler: Sampler) -> None:
    done = complete_all(
        sampler, [(prompt(6), params(max_tokens=5, stop_token_ids=()), seed) for seed in range(4)]
    )
    assert [len(completion.token_ids) for completion in done] == [5] * 4
    assert {completion.finish_reason for completion in done} == {"length"}


def test_each_request_has_its_own_cap(sampler: Sampler) -> None:
    caps = [1, 7, 3, 20, 7]
    done = complete_all(
        sampler,
        [(prompt(6), params(max_tokens=cap, stop_token_ids=()), cap) for cap in caps],
    )
    assert [len(completion.token_ids) for completion in done] == caps


def test_a_stop_on_the_last_allowed_token_is_a_stop(sampler: Sampler) -> None:
    done = complete_all(
        sampler,
        [(prompt(3), params(max_tokens=1, stop_token_ids=tuple(range(VOCABULARY))), 1)],
    )
    assert done[0].finish_reason == "stop"
    assert len(done[0].token_ids) == 1


def test_logprobs_are_the_models_own(candidate: Candidate, sampler: Sampler) -> None:
    for (ids, *_), completion in zip(MIXED, complete_all(sampler, MIXED), strict=True):
        expected = candidate.logprobs([*ids, *completion.token_ids])
        drawn = torch.tensor(completion.token_ids)
        rows = expected[len(ids) - 1 : -1].gather(1, drawn[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), rows, atol=candidate.tolerance, rtol=0
        )


def test_the_same_seed_gives_the_same_tokens_in_any_order_of_arrival(
    candidate: Candidate, sampler: Sampler
) -> None:
    forwards = complete_all(sampler, MIXED)
    backwards = complete_all(sampler, MIXED[::-1])[::-1]
    rotated = complete_all(candidate.make(), [*MIXED[3:], *MIXED[:3]])
    assert_same(candidate, forwards, backwards)
    assert_same(candidate, forwards, [*rotated[-3:], *rotated[:-3]])


def assert_same(
    candidate: Candidate, left: Sequence[Completion], right: Sequence[Completion]
) -> None:
    if candidate.exact:
        assert left == right
    for one, other in zip(left, right, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=candidate.tolerance)


def test_a_batch_changes_no_answer(candidate: Candidate, sampler: Sampler) -> None:
    """Other lengths beside it (padding), and rows that end before it (compaction), leave a request alone."""
    requests = [
        (ids, params(max_tokens=3 + 9 * (index % 3)), seed)
        for index, (ids, _, seed) in enumerate(MIXED)
    ]
    together = complete_all(sampler, requests)
    assert len({len(completion.token_ids) for completion in together}) > 3
    for request, completion in zip(requests, together, strict=True):
        (alone,) = complete_all(sampler, [request])
        assert alone.token_ids == completion.token_ids
        assert alone.finish_reason == completion.finish_reason
        torch.testing.assert_close(
            torch.tensor(alone.logprobs),
            torch.tensor(completion.logprobs),
            atol=candidate.tolerance,
            rtol=0,
        )


def test_different_seeds_draw_differently(sampler: Sampler) -> None:
    done = complete_all(
        sampler, [(prompt(6), params(stop_token_ids=()), seed) for seed in range(8)]
    )
    assert len({completion.token_ids for completion in done}) == 8


def test_padded_ids_are_never_drawn(candidate: Candidate, sampler: Sampler) -> None:
    first = candidate.logits(prompt(6))[-1].softmax(-1)
    assert first[VOCABULARY:].sum() > 0.5, "the test is about nothing unless padding has the mass"
    for temperature in (1.0, candidate.max_temperature):
        done = complete_all(
            sampler,
            [
                (prompt(6), params(temperature=temperature, stop_token_ids=()), seed)
                for seed in range(50)
            ],
        )
        assert max(max(completion.token_ids) for completion in done) < VOCABULARY


def test_completions_name_the_policy_version(candidate: Candidate, sampler: Sampler) -> None:
    (completion,) = complete_all(sampler, MIXED[:1])
    assert completion.policy_version == candidate.version


def test_greedy_is_argmax(candidate: Candidate, sampler: Sampler) -> None:
    requests = [(ids, params(temperature=0.0), seed) for ids, _, seed in MIXED]
    for (ids, *_), completion in zip(requests, complete_all(sampler, requests), strict=True):
        expected = candidate.logprobs([*ids, *completion.token_ids])[len(ids) - 1 : -1]
        assert completion.token_ids == tuple(expected.argmax(-1).tolist())


def test_frequencies_follow_the_distribution(candidate: Candidate, sampler: Sampler) -> None:
    draws = 4000
    ids = prompt(6)
    done = complete_all(sampler, [(ids, params(max_tokens=1), seed) for seed in range(draws)])
    counts = Counter(completion.token_ids[0] for completion in done)
    expected = candidate.logprobs(ids)[-1].double().exp() * draws
    assert chi_square_deviations(counts, expected) < 5
    # The bound must be able to fail: the same draws against a distribution a little flatter.
    flatter = candidate.logprobs(ids, temperature=1.5)[-1].double().exp() * draws
    assert chi_square_deviations(counts, flatter) > 5


def chi_square_deviations(counts: Counter[int], expected: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic is above its mean; rare ids are put together."""
    statistic, bins, rare_seen, rare_expected = 0.0, 0, 0, 0.0
    for token, value in enumerate(expected.tolist()):
        if value < 5:
            rare_seen += counts[token]
            rare_expected += value
        else:
            statistic += (counts[token] - value) ** 2 / value
            bins += 1
    if rare_expected > 0:
        statistic += (rare_seen - rare_expected) ** 2 / rare_expected
        bins += 1
    assert bins > 10
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_processed_by_temperature(
    candidate: Candidate, sampler: Sampler, temperature: float
) -> None:
    requests = [(ids, params(temperature=temperature), seed) for ids, _, seed in MIXED]
    for (ids, *_), completion in zip(requests, complete_all(sampler, requests), strict=True):
        rows = candidate.logprobs([*ids, *completion.token_ids], temperature)[len(ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=candidate.tolerance * 2, rtol=0
        )


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.4}, {"top_k": 9, "top_p": 0.6}])
def test_logprobs_are_processed_by_top_k_and_top_p(
    candidate: Candidate, sampler: Sampler, cut: dict[str, float]
) -> None:
    ids = prompt(6)
    temperature = 2.0
    done = complete_all(
        sampler,
        [(ids, params(max_tokens=1, temperature=temperature, **cut), seed) for seed in range(300)],
    )
    probabilities = candidate.logprobs(ids, temperature)[-1].double().exp()
    kept = nucleus(probabilities, int(cut.get("top_k", 0)), cut.get("top_p", 1.0))
    renormalised = probabilities / probabilities[kept].sum()
    assert {completion.token_ids[0] for completion in done} <= set(kept)
    assert len({completion.token_ids[0] for completion in done}) > 1
    for completion in done:
        assert completion.logprobs[0] == pytest.approx(
            math.log(renormalised[completion.token_ids[0]]), abs=candidate.tolerance * 2
        )


def nucleus(probabilities: torch.Tensor, top_k: int, top_p: float) -> list[int]:
    """Ids that survive: the k likeliest, then the fewest of them that hold ``top_p`` of their mass."""
    order = probabilities.argsort(descending=True).tolist()[: top_k or None]
    total = sum(probabilities[token].item() for token in order)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probabilities[token].item() / total
        if mass >= top_p:
            break
    return kept


def test_requests_with_different_settings_do_not_mix(sampler: Sampler) -> None:
    greedy = (prompt(6), params(temperature=0.0), 1)
    drawn = (prompt(6), params(), 1)
    other_stop = (prompt(6), params(stop_token_ids=()), 1)
    apart = [
        complete_all(sampler, [request])[0].token_ids for request in (greedy, drawn, other_stop)
    ]
    together = complete_all(sampler, [greedy, drawn, other_stop])
    assert [completion.token_ids for completion in together] == apart
