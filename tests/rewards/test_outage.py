"""A judge that cannot be asked: waited for where the student learns from it, and never taken for a score."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.judges import VARIABLES, Answer, Judge, completion, judge_server

from rnow.errors import EXIT_TEMPORARY, TemporaryError
from rnow.project.user_code import load_rewards
from rnow.rewards import RewardRunner, outage
from rnow.rewards.outage import Outage
from rnow.types import Prompt, RewardResult, Rollout
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome, CodeHost

INFO = FunctionInfo(kind="rewards", name="style", file=Path("rewards.py"), place="rewards.py:5")
DOWN = CallOutcome(
    status="raised", error="JudgeUnavailable: 503", place="rewards.py:7", passing=True
)
GOOD = CallOutcome(status="ok", value=1.0)
BROKEN = CallOutcome(status="raised", error="KeyError: 'answer'")

REWARDS = """
from rnow.core import llm_judge, reward

@reward(timeout=2)
async def style(args, messages):
    return await llm_judge("?", secrets=args.secrets)

@reward(timeout=2)
def sync_style(args, messages):
    return llm_judge("?", secrets=args.secrets) / 2

@reward(timeout=2)
async def unawaited(args, messages):
    return llm_judge("?", secrets=args.secrets) / 2

@reward
def length(args, messages):
    return 0.25
"""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.02)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def call(of: Outage, *outcomes: CallOutcome) -> tuple[CallOutcome, int]:
    """What comes of a reward whose calls end so, the last one again and again; and how often it was called."""
    given = itertools.chain(outcomes, itertools.repeat(outcomes[-1]))
    count = 0

    async def attempt() -> CallOutcome:
        nonlocal count
        count += 1
        return next(given)

    return asyncio.run(of.call(INFO, attempt)), count


def test_it_is_asked_again_until_it_answers_and_told_of_once() -> None:
    told: list[str] = []
    of = Outage(60.0, told.append)
    assert call(of, DOWN, DOWN, DOWN, GOOD) == (GOOD, 4)
    assert told == [
        'waiting up to 60 s for the judge of reward "style": JudgeUnavailable: 503',
    ]
    assert call(of, DOWN, GOOD) == (GOOD, 2)
    assert len(told) == 2, "it is another outage"


def test_other_failures_are_not_waited_for() -> None:
    assert call(Outage(60.0, print), BROKEN) == (BROKEN, 1)
    assert call(Outage(60.0, print), DOWN, BROKEN) == (BROKEN, 2)


def test_without_patience_it_is_a_failure_like_others() -> None:
    assert call(Outage(0.0, print), DOWN) == (DOWN, 1)


def test_it_ends_for_now_when_the_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PATIENCE", 0.1)
    told: list[str] = []
    of = Outage(0.3, told.append)
    with pytest.raises(TemporaryError, match=r"could not be asked for 0\.1 s") as caught:
        call(of, DOWN)
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert caught.value.where == "rewards.py:7"
    assert caught.value.why == "JudgeUnavailable: 503"
    assert "run the same command again" in (caught.value.fix or "")
    assert len(told) == 1
    assert call(of, GOOD) == (GOOD, 1)
    with pytest.raises(TemporaryError, match=r"for 0\.3 s"):  # it was there once
        call(of, DOWN)


# -- through the processes that run rewards ----------------------------------------------------------------------------


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judge_server() as judge:
        yield judge


def score(folder: Path, judge: Judge, names: str, of: Outage | None = None) -> RewardResult:
    (folder / "rewards.py").write_text(REWARDS)
    secrets = {"OPENAI_API_KEY": "sk-never-shown-1", "LLM_JUDGE_API_URL": judge.url}
    host = CodeHost(folder / "rewards.py", "rewards", secrets=secrets)
    runner = RewardRunner(load_rewards(folder, secrets=secrets), host, outage=of)
    prompt = Prompt(
        id="dataset_0/0",
        dataset="dataset_0",
        row=0,
        messages=({"role": "user", "content": "hi"},),
        rewards=tuple(names.split()),
    )
    rollout = Rollout(
        prompt_id=prompt.id,
        index=0,
        turns=(),
        messages=({"role": "assistant", "content": "ho"},),
        status="completed",
        end_reason="answer",
    )
    try:
        found = asyncio.run(runner.score(prompt, rollout))
    finally:
        runner.close()
    assert found is not None
    assert "sk-never-shown-1" not in str(found)
    return found


def test_sync_async_and_unawaited_rewards_give_the_judges_score(
    tmp_path: Path, judge: Judge
) -> None:
    judge.says('{"score": 1}')
    found = score(tmp_path, judge, "style sync_style unawaited length")
    assert dict(found.breakdown) == {
        "style": 1.0, "sync_style": 0.5, "unawaited": 0.5, "length": 0.25,
    }  # fmt: skip
    assert not found.errors
    assert {h["Authorization"] for h in judge.headers} == {"Bearer sk-never-shown-1"}


def test_a_judge_that_comes_back_costs_only_the_wait(tmp_path: Path, judge: Judge) -> None:
    busy = Answer(status=503, headers={"Retry-After": "3600"})  # a call does not wait for that
    judge.answers = [busy] * 3 + [completion('{"score": 1}')]
    found = score(tmp_path, judge, "style length", Outage(60.0, lambda text: None))
    assert (found.total, dict(found.errors)) == (1.25, {})
    assert len(judge.requests) == 4


def test_where_it_is_not_waited_for_the_rollout_says_why(tmp_path: Path, judge: Judge) -> None:
    judge.answers = [Answer(status=429, headers={"Retry-After": "60"}, body="sk-never-shown-1")]
    found = score(tmp_path, judge, "sync_style length")
    assert found.errors["sync_style"].startswith(
        "JudgeUnavailable: the judge at [LLM_JUDGE_API_URL]/"
    )
    assert "answered 429" in found.errors["sync_style"]
    assert "(rewards.py:10)" in found.errors["sync_style"]


def test_one_that_does_not_answer_is_told_apart_from_a_reward_that_hangs(
    tmp_path: Path, judge: Judge
) -> None:
    """The judge's own limit is 60 s, and the reward's 2: the call must not be ended before it can say what is wrong."""
    judge.answers = [Answer(after=30.0)]
    found = score(tmp_path, judge, "style sync_style")
    for name in ("style", "sync_style"):
        assert found.errors[name].startswith("JudgeUnavailable"), found.errors
        assert "did not answer in time" in found.errors[name]


def test_what_gives_up_leaves_no_other_reward_running(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_PATIENCE", 0.05)
    judge.answers = [Answer(status=503, headers={"Retry-After": "60"})]
    with pytest.raises(TemporaryError, match="judge of reward"):
        score(tmp_path, judge, "style sync_style unawaited", Outage(60.0, lambda text: None))
