"""The rule on chunks: its gradient by enumerating every answer, and what a chunk is in a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rnow.algorithm.batching import collate
from rnow.algorithm.chunks import Chunks
from rnow.algorithm.head import Head
from rnow.algorithm.policy_gradient import PolicyGradient, shape_advantages
from rnow.algorithm.records import ChunkEvidence, MicroBatch, SampledEvidence, TrainingSample
from rnow.algorithm.surrogate import token_losses
from rnow.types import Sample

STUDENT = ("a", "b", "ab")
"""Three tokens, so that one text has several spellings."""
LENGTH = 3


class Student:
    """A table of logits: which token follows what was written so far."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(3), repeat=n)]
        self.rows = {prefix: row for row, prefix in enumerate(prefixes)}
        self.logits = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64)
        self.logits.requires_grad_()

    def logprobs(self, answer: Sequence[int]) -> Tensor:
        """``[T]`` of the tokens of an answer."""
        table = self.logits.log_softmax(-1)
        return torch.stack(
            [table[self.rows[tuple(answer[:t])], token] for t, token in enumerate(answer)]
        )

    def answers(self) -> list[tuple[int, ...]]:
        return [*itertools.product(range(3), repeat=LENGTH)]


def teacher_logprob(before: str, token: str) -> float:
    """Some distribution over tokens for each context: any will do."""
    seed = sum((i + 2) * ord(letter) for i, letter in enumerate(before))
    table = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return float(table.log_softmax(-1)[len(token) * 2 + (token[0] == "a")])


def whole(text: str) -> list[str]:
    """A teacher with a token for every text: each answer is one chunk."""
    return [text]


def pairs(text: str) -> list[str]:
    """Two letters each: where a token ends, what follows has no say."""
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def runs(text: str) -> list[str]:
    """One letter, or the same twice: ``a`` is a token of its own only where no other follows."""
    found: list[str] = []
    for letter in text:
        if found and found[-1] == letter:
            found[-1] += letter
        else:
            found.append(letter)
    return found


Cut = Callable[[str], list[str]]


def chunks_of(answer: Sequence[int], cut: Cut) -> list[tuple[list[int], float]]:
    """For each chunk the positions of the student's tokens, and the teacher's log-probability: by comparing texts."""
    ours, theirs = [STUDENT[token] for token in answer], cut("".join(STUDENT[t] for t in answer))
    found: list[tuple[list[int], float]] = []
    i = j = 0
    while i < len(ours):
        left, right, start, total = "", "", i, 0.0
        while not left or left != right:
            if len(left) <= len(right):
                left, i = left + ours[i], i + 1
            else:
                total += teacher_logprob("".join(theirs[:j]), theirs[j])
                right, j = right + theirs[j], j + 1
        found.append(([*range(start, i)], total))
    return found


def evidence_of(answer: Sequence[int], cut: Cut) -> tuple[Tensor, Chunks]:
    shares, index = torch.zeros(len(answer), dtype=torch.float64), torch.zeros(len(answer)).long()
    for number, (positions, total) in enumerate(chunks_of(answer, cut)):
        for position in positions:
            shares[position], index[position] = total / len(positions), number
    return shares, Chunks(index=index, teacher_tokens=torch.ones_like(index))


def expected_gradient(student: Student, cut: Cut, *, split: bool = False) -> Tensor:
    """Of our rule, over every answer: what many samples would average to. ``split``: without chunks, each token has its
    share alone."""
    total = torch.zeros((), dtype=torch.float64)
    for answer in student.answers():
        logprobs = student.logprobs(answer)
        teacher, chunks = evidence_of(answer, cut)
        shaped = shape_advantages(
            torch.zeros_like(teacher),
            logprobs,
            teacher,
            chunks=None if split else chunks,
            kl_penalty_coef=1.0,
            reward_coef=0.0,
            kl_clamp=1e9,
        )
        found = token_losses(
            logprobs,
            logprobs.detach(),
            shaped.advantages,
            loss_fn="importance_sampling",
            clip_ratio_low=0.2,
            clip_ratio_high=0.2,
            ratio_cap=10.0,
        )
        total = total + logprobs.detach().sum().exp() * found.losses.sum()
    (gradient,) = torch.autograd.grad(total, student.logits)
    return gradient


def exact_gradient(student: Student, value: Callable[[tuple[int, ...], Tensor], Tensor]) -> Tensor:
    """Of the expectation of ``value(answer, logprobs)``, by plain autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for answer in student.answers():
        logprobs = student.logprobs(answer)
        total = total + logprobs.sum().exp() * value(answer, logprobs)
    (gradient,) = torch.autograd.grad(total, student.logits)
    return gradient


def test_an_answer_that_is_one_chunk_has_the_gradient_of_its_kl() -> None:
    student = Student()

    def kl(answer: tuple[int, ...], logprobs: Tensor) -> Tensor:
        ((_, teacher),) = chunks_of(answer, whole)
        return logprobs.sum() - teacher

    exact = exact_gradient(student, kl)
    assert torch.allclose(expected_gradient(student, whole), exact, atol=1e-12)
    split = expected_gradient(student, whole, split=True)
    assert (split - exact).norm() > 0.1 * exact.norm(), "equal shares would be biased"


def surrogate(student: Student, cut: Cut, *, later: bool) -> Tensor:
    """By hand: the gradient of E[sum over chunks of k log p(chunk)], k fixed, of the chunk's own KL or of all later ones."""

    def value(answer: tuple[int, ...], logprobs: Tensor) -> Tensor:
        chunks = [(logprobs[positions].sum(), total) for positions, total in chunks_of(answer, cut)]
        gaps = [chunk.item() - total for chunk, total in chunks]
        kept = [math.fsum(gaps[n + 1 :]) if later else gaps[n] for n in range(len(gaps))]
        # 0 in value: of the expectation's gradient the score-function term alone is left.
        terms = [(c - c.detach()) * k for (c, _), k in zip(chunks, kept, strict=True)]
        return torch.stack(terms).sum()

    return exact_gradient(student, value)


def test_a_chunk_has_the_gradient_of_its_own_kl() -> None:
    """As for tokens, what a chunk does to later ones is not counted; with it, it is the gradient of the whole KL, as long
    as a chunk's end does not depend on what follows."""
    student = Student()

    def missing(cut: Cut) -> float:
        """Share of the KL's gradient that neither a chunk's own KL nor the later ones account for."""

        def kl(answer: tuple[int, ...], logprobs: Tensor) -> Tensor:
            return logprobs.sum() - math.fsum(total for _, total in chunks_of(answer, cut))

        exact = exact_gradient(student, kl)
        ours = expected_gradient(student, cut)
        assert torch.allclose(ours, surrogate(student, cut, later=False), atol=1e-12)
        rest = exact - ours - surrogate(student, cut, later=True)
        return float(rest.norm() / exact.norm())

    for cut, sizes in ((pairs, {1, 2, 3}), (runs, {1, 2, 3})):
        assert {len(p) for a in student.answers() for p, _ in chunks_of(a, cut)} == sizes
    assert missing(pairs) < 1e-12
    # A tokenizer that looks ahead decides with a later token where an earlier chunk ended.
    assert 0.01 < missing(runs) < 0.5


def test_the_reported_kl_is_the_kl_per_token() -> None:
    student = Student()
    total = tokens = expected = 0.0
    for answer in student.answers():
        logprobs = student.logprobs(answer).detach()
        weight = float(logprobs.sum().exp())
        teacher, _ = evidence_of(answer, runs)
        total += weight * float((logprobs - teacher).sum())
        tokens += weight * len(answer)
        gaps = [logprobs[p].sum().item() - t for p, t in chunks_of(answer, runs)]
        expected += weight * math.fsum(gaps)
    assert total / tokens == pytest.approx(expected / LENGTH, abs=1e-12)


# ---- in a batch ---------------------------------------------------------------------------------------------------


def chunk_evidence(
    logprobs: Sequence[float], starts: Sequence[int], tokens: Sequence[int]
) -> ChunkEvidence:
    return ChunkEvidence(
        teacher_logprobs=torch.tensor(logprobs),
        chunk_starts=torch.tensor(starts).bool(),
        teacher_tokens=torch.tensor(tokens),
    )


def training_sample(row: int, evidence: ChunkEvidence | SampledEvidence) -> TrainingSample:
    count = len(evidence.teacher_logprobs)
    return TrainingSample(
        sample=Sample(
            id=f"words/{row}#0",
            dataset="words",
            token_ids=tuple(range(1, count + 2)),
            loss_mask=(False, *[True] * count),
            sampler_logprobs=(0.0, *[-1.5] * count),
        ),
        reward_advantage=0.0,
        evidence=evidence,
    )


FIRST = chunk_evidence([-1.0, -1.0, -2.0, -1.5], [1, 0, 1, 1], [1, 1, 1, 0])
SECOND = chunk_evidence([-3.0, -3.0], [1, 0], [3, 3])


def micro_of(*evidence: ChunkEvidence | SampledEvidence) -> MicroBatch:
    return collate([training_sample(row, found) for row, found in enumerate(evidence)], "cpu")


def test_a_chunk_ends_with_its_answer() -> None:
    chunks = Chunks.of(micro_of(FIRST, SECOND).evidence)
    assert chunks is not None
    gaps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert chunks.credit(gaps).tolist() == [3.0, 3.0, 4.0, 0.0, 48.0, 48.0]
    assert chunks.sizes.tolist() == [2, 2, 1, 0, 2, 2]
    assert {name: values.tolist() for name, values in chunks.streams().items()} == {
        "chunks/covered": [True, True, True, False, True, True],
        "chunks/one_to_one": [False, False, True, False, False, False],
        "chunks/tokens": [2, 2, 1, 0, 2, 2],
    }
    nothing = Chunks.of(
        {"chunk_starts": torch.zeros(0).bool(), "teacher_tokens": torch.zeros(0).long()}
    )
    assert nothing is not None
    assert nothing.credit(torch.zeros(0)).tolist() == []
    assert Chunks.of({"teacher_logprobs": torch.zeros(3)}) is None


def terms_of(
    micro: MicroBatch, objective: PolicyGradient
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(7, 3, generator=generator))
    hidden = torch.randn(8, 3, generator=generator)[: len(micro.tokens.targets)].requires_grad_()
    terms = objective.terms(hidden, head, micro)
    terms.losses.sum().backward()
    assert hidden.grad is not None
    return terms.losses, dict(terms.streams), hidden.grad


def test_every_token_of_a_chunk_has_the_live_gap_of_the_whole() -> None:
    """Live: the student's log-probabilities at this update, not those of the sampler."""
    objective = PolicyGradient(loss_fn="importance_sampling", kl_penalty_coef=0.5, kl_clamp=2.0)
    _, streams, gradient = terms_of(micro_of(FIRST, SECOND), objective)
    live, share = streams["logprobs"], streams["teacher_logprobs"]
    gaps = (live - share).tolist()
    whole = [gaps[0] + gaps[1]] * 2 + [gaps[2], 0.0] + [gaps[4] + gaps[5]] * 2
    bounded = [-0.5 * max(-2.0, min(2.0, gap)) for gap in whole]
    assert streams["advantages"].tolist() == pytest.approx(bounded, abs=1e-6)
    assert streams["kl_clamped"].tolist() == [abs(gap) > 2.0 for gap in whole]
    assert any(abs(gap) > 2.0 for gap in whole)
    assert streams["teacher_kl"].tolist() == pytest.approx(gaps, abs=1e-6)
    assert "teacher_kl/k3" not in streams
    assert gradient[3].abs().max() == 0.0, "a token in no chunk teaches nothing"
    assert all(gradient[row].abs().max() > 0 for row in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("loss_fn", ["ppo", "importance_sampling"])
def test_chunks_of_one_token_are_the_plain_rule(loss_fn: str) -> None:
    values = [-1.0, -0.25, -3.0]
    plain = SampledEvidence(teacher_logprobs=torch.tensor(values))
    chunked = chunk_evidence(values, [1, 1, 1], [1, 1, 1])
    objective = PolicyGradient(loss_fn=loss_fn, reward_coef=0.0)  # type: ignore[arg-type]
    losses, streams, gradient = terms_of(micro_of(plain), objective)
    others, found, theirs = terms_of(micro_of(chunked), objective)
    assert torch.equal(losses, others)
    assert torch.equal(gradient, theirs)
    for name in found.keys() & streams.keys():
        assert torch.equal(found[name], streams[name]), name
    assert streams.keys() - found.keys() == {"teacher_kl/k3"}
