"""What every Teacher must do: see ``tests/teacher/conformance.py``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.teacher.conformance import CANDIDATES, Candidate, make_sample

from rnow.algorithm.records import TeacherNeeds, TopKEvidence
from rnow.errors import ConfigError
from rnow.protocols import Teacher
from rnow.types import Sample

SAMPLES = [
    make_sample("dataset_0/0#0", 12),
    make_sample("dataset_0/0#1", 3, first=50),
    make_sample("dataset_1/7#0", 30, loss=[4, 5, 6, 20, 21, 29]),  # three turns
    make_sample("dataset_1/7#1", 30, loss=[1], first=9),
    make_sample("dataset_1/8#0", 8, loss=range(1, 8)),
]


@pytest.fixture(scope="module", params=CANDIDATES)
def candidate(
    request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]
) -> Iterator[Candidate]:
    built = request.param(tiny_model_dir)
    yield built
    built.close()


def score(teacher: Teacher, samples: Sequence[Sample]) -> Mapping[str, Any]:
    evidence = asyncio.run(teacher.score(samples))
    return {name: found.teacher_logprobs for name, found in evidence.items()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0)


def test_is_a_teacher(candidate: Candidate) -> None:
    assert isinstance(candidate.make(1.0, None), Teacher)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_values_are_those_of_a_full_softmax(candidate: Candidate, temperature: float) -> None:
    if candidate.served and temperature != 1.0:
        with pytest.raises(ConfigError, match="temperature"):
            candidate.make(temperature, None)
        return
    found = score(candidate.make(temperature, None), SAMPLES)
    expected = {sample.id: candidate.expected(sample, temperature) for sample in SAMPLES}
    assert_same(found, expected, candidate.tolerance * 3)
    assert all(values.dtype == torch.float32 for values in found.values())


def test_padding_rows_take_no_probability(candidate: Candidate) -> None:
    sample = SAMPLES[0]
    with_padding = torch.log_softmax(candidate.logits(sample.token_ids), dim=-1)
    position = sample.loss_mask.index(True)
    naive = with_padding[position - 1, sample.token_ids[position]].item()
    found = score(candidate.make(1.0, None), [sample])[sample.id][0].item()
    if candidate.served:
        assert found == pytest.approx(naive, abs=candidate.tolerance), "its check reports the mass"
        return
    assert found - naive > 0.5, "counting the padded ids would have cost half a nat here"


def test_only_loss_tokens_are_judged(candidate: Candidate) -> None:
    found = score(candidate.make(1.0, None), SAMPLES)
    for sample in SAMPLES:
        assert found[sample.id].shape == (sum(sample.loss_mask),)
        assert (found[sample.id] < 0).all()


def test_answers_go_by_sample_id_whatever_the_order(candidate: Candidate) -> None:
    teacher = candidate.make(1.0, None)
    forwards = score(teacher, SAMPLES)
    assert list(forwards) != [], "keyed by id"
    assert_same(score(teacher, SAMPLES[::-1]), forwards, candidate.tolerance)
    assert_same(score(teacher, SAMPLES[2:] + SAMPLES[:2]), forwards, candidate.tolerance)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 61, 10_000])
def test_micro_batches_change_nothing(candidate: Candidate, micro_batch_tokens: int) -> None:
    expected = {sample.id: candidate.expected(sample) for sample in SAMPLES}
    found = score(candidate.make(1.0, micro_batch_tokens), SAMPLES)
    assert_same(found, expected, candidate.tolerance)


def test_a_sample_alone_is_judged_as_among_others(candidate: Candidate) -> None:
    teacher = candidate.make(1.0, None)
    together = score(teacher, SAMPLES)
    for sample in SAMPLES:
        assert_same(score(teacher, [sample]), {sample.id: together[sample.id]}, candidate.tolerance)


def test_later_tokens_do_not_matter(candidate: Candidate) -> None:
    teacher = candidate.make(1.0, None)
    sample = SAMPLES[0]
    other = replace(sample, token_ids=(*sample.token_ids[:-1], 1))
    before = score(teacher, [sample])[sample.id]
    after = score(teacher, [other])[sample.id]
    torch.testing.assert_close(before[:-1], after[:-1], atol=candidate.tolerance, rtol=0)
    assert abs(before[-1] - after[-1]) > 1e-3


def test_no_samples_no_evidence(candidate: Candidate) -> None:
    assert score(candidate.make(1.0, None), []) == {}


def test_asking_twice_gives_the_same(candidate: Candidate) -> None:
    teacher = candidate.make(1.0, None)
    first, second = score(teacher, SAMPLES), score(teacher, SAMPLES)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the likeliest tokens, when asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 7, 20])
def test_the_likeliest_tokens_in_order_beside_the_sampled_one(
    candidate: Candidate, top_k: int
) -> None:
    evidence = asyncio.run(candidate.make(1.0, None).score(SAMPLES, TeacherNeeds(top_k=top_k)))
    assert evidence.keys() == {sample.id for sample in SAMPLES}
    outside = 0
    for sample in SAMPLES:
        found = evidence[sample.id]
        assert isinstance(found, TopKEvidence)
        count = sum(sample.loss_mask)
        assert found.ids.shape == found.logprobs.shape == (count, top_k)
        assert (found.ids.dtype, found.logprobs.dtype) == (torch.long, torch.float32)
        torch.testing.assert_close(
            found.teacher_logprobs, candidate.expected(sample), atol=candidate.tolerance, rtol=0
        )
        mask = torch.tensor(sample.loss_mask)
        table = candidate.table(sample)[:-1][mask[1:]].float()
        ids, logprobs = found.ids, found.logprobs
        close = {"atol": candidate.tolerance, "rtol": 0.0}
        torch.testing.assert_close(logprobs, table.topk(top_k).values, **close)
        # By value and by id apart: two tokens a hair's breadth from each other may change places.
        torch.testing.assert_close(logprobs, table.gather(1, ids), **close)
        assert (logprobs.diff(dim=-1) <= 0).all()
        assert all(len(set(row)) == top_k for row in ids.tolist())
        left = 1.0 - table.topk(top_k).values.exp().sum(-1)
        torch.testing.assert_close(found.tail(), left, **close)
        drawn = torch.tensor(sample.token_ids)[mask][:, None]
        outside += int((ids != drawn).all(dim=-1).sum())
    assert outside > 0, "some sampled token must be outside of the likeliest, or nothing is shown"


def test_the_likeliest_tokens_change_no_logprob(candidate: Candidate) -> None:
    plain = score(candidate.make(1.0, None), SAMPLES)
    top = asyncio.run(candidate.make(1.0, None).score(SAMPLES, TeacherNeeds(top_k=5)))
    found = {name: item.teacher_logprobs for name, item in top.items()}
    assert_same(found, plain, candidate.tolerance)


def test_the_likeliest_tokens_of_no_tokens(candidate: Candidate) -> None:
    sample = make_sample("a", 5, loss=[])
    found = asyncio.run(candidate.make(1.0, None).score([sample], TeacherNeeds(top_k=4)))["a"]
    assert isinstance(found, TopKEvidence)
    assert found.ids.shape == found.logprobs.shape == (0, 4)
    assert found.teacher_logprobs.shape == (0,)
