"""The optimal baseline against brute force, and what it leaves as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.algorithm import reference
from tests.algorithm.direct import CASES, HIDDEN, ROWS, VOCABULARY, Both, Case, gradient_of, make
from torch import Tensor

from rnow.algorithm.baseline import KlBaseline
from rnow.algorithm.head import Tiling
from rnow.algorithm.policy_gradient import PolicyGradient


def objective(both: Both, top_k: int = 0) -> PolicyGradient:
    baseline = KlBaseline(heads={"teacher": both.teacher_head}, top_k=top_k)
    return PolicyGradient(
        loss_fn="importance_sampling",
        kl_penalty_coef=1.0,
        temperature=both.case.temperature,
        baseline=baseline,
    )


def tables(both: Both) -> tuple[Tensor, Tensor]:
    student = reference.log_softmax(both.student_logits(both.hidden))
    return student, reference.log_softmax(both.teacher_logits)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("top_k", [0, VOCABULARY - 1])
@pytest.mark.parametrize("tile", [1, 4, 1000])
def test_against_brute_force(
    case: Case, top_k: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiling = Tiling(rows=tile, width=tile)
    monkeypatch.setattr("rnow.algorithm.head.tiling_for", lambda head: tiling)
    both = make(case)
    judged = both.with_top_k(top_k) if top_k else both
    _, streams, _ = gradient_of(objective(judged, top_k), judged)
    student, teacher = tables(both)
    expected = [reference.optimal_baseline(p, q) for p, q in zip(student, teacher, strict=True)]
    # With all but one token listed the bucket is that token.
    torch.testing.assert_close(
        streams["kl_baseline"], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0
    )
    chosen = teacher.gather(1, both.micro.tokens.targets[:, None])[:, 0]
    torch.testing.assert_close(streams["teacher_logprobs"], chosen, atol=1e-12, rtol=0)


def drawn(both: Both, x: int, top_k: int) -> Both:
    student, teacher = tables(both)
    known = {"teacher_hidden": both.teacher_hidden}
    if top_k:
        known = {**both.with_top_k(top_k).micro.evidence}
    if top_k or not known:
        known["teacher_logprobs"] = teacher[:, x]
    micro = replace(
        both.micro,
        tokens=replace(both.micro.tokens, targets=torch.full((ROWS,), x)),
        sampler_logprobs=student[:, x],
        reward_advantages=torch.zeros(ROWS, dtype=torch.float64),
        evidence=known,
        teacher=None if top_k else "teacher",
    )
    return replace(both, micro=micro)


@pytest.mark.parametrize("top_k", [0, 2, 5])
def test_same_gradient_on_average_with_less_noise(top_k: int) -> None:
    both = make(CASES["plain"])
    student, _ = tables(both)
    plain = replace(objective(both), baseline=None)
    found: dict[str, Tensor] = {}
    noise: dict[str, float] = {}
    for name, rule in (("plain", plain), ("optimal", objective(both, top_k))):
        mean = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
        square = 0.0
        for x in range(VOCABULARY):
            one = drawn(both, x, top_k)
            if name == "plain":
                teacher = tables(both)[1][:, x]
                micro = replace(one.micro, evidence={"teacher_logprobs": teacher}, teacher=None)
                one = replace(one, micro=micro)
            *_, gradient = gradient_of(rule, one)
            weight = student[:, x, None].exp()
            mean += weight * gradient
            square += (weight * gradient**2).sum().item()
        found[name], noise[name] = mean, square - (mean**2).sum().item()
    torch.testing.assert_close(found["optimal"], found["plain"], atol=1e-12, rtol=0)
    assert noise["optimal"] < 0.9 * noise["plain"]


def test_a_student_that_is_certain_gives_a_finite_baseline() -> None:
    both = make(CASES["plain"])
    certain = replace(both, hidden=1000 * both.hidden)
    _, streams, gradient = gradient_of(objective(certain), certain)
    assert streams["kl_baseline"].isfinite().all()
    assert gradient.isfinite().all()


def test_what_it_needs_of_the_teacher() -> None:
    both = make(CASES["plain"])
    assert objective(both).needs.hidden
    assert objective(both, 5).needs.top_k == 5
    assert not replace(objective(both), baseline=None).needs.hidden
    assert "kl_baseline" in objective(both).summaries
