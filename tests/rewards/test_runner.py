"""RewardRunner: how rewards combine, and that no reward can stop a run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rnow.core import RewardArgs, reward
from rnow.core.reward import RewardSpec, reward_spec
from rnow.errors import DataError
from rnow.protocols import Rewarder
from rnow.rewards import RewardRunner
from rnow.types import Message, Prompt, RewardResult, Rollout, RolloutStatus


def specs(*functions: Callable[..., Any]) -> dict[str, RewardSpec]:
    found = [reward_spec(function) for function in functions]
    assert all(found)
    return {spec.name: spec for spec in found if spec is not None}


def prompt(*rewards: str, **fields: Any) -> Prompt:
    defaults: dict[str, Any] = {"messages": ({"role": "user", "content": "2+2?"},)}
    return Prompt(id="d/0", dataset="d", row=0, rewards=rewards, **(defaults | fields))


def rollout(
    *messages: Message, status: RolloutStatus = "completed", error: str | None = None
) -> Rollout:
    return Rollout(
        prompt_id="d/0",
        index=0,
        token_ids=(),
        loss_mask=(),
        sampler_logprobs=(),
        turns=(),
        messages=messages or ({"role": "assistant", "content": "4"},),
        status=status,
        error=error,
    )


def run(
    functions: tuple[Callable[..., Any], ...],
    asked: Prompt | None = None,
    answer: Rollout | None = None,
    **options: Any,
) -> RewardResult:
    asked = asked or prompt(*(function.__name__ for function in functions))
    runner = RewardRunner(specs(*functions), **options)
    result = asyncio.run(runner.score(asked, answer or rollout()))
    assert result is not None
    return result


def test_it_is_a_rewarder() -> None:
    assert isinstance(RewardRunner({}), Rewarder)


def test_a_prompt_without_rewards_has_none() -> None:
    assert asyncio.run(RewardRunner({}).score(prompt(), rollout())) is None


def test_sync_and_async_rewards_are_summed() -> None:
    @reward
    def half(args: RewardArgs, messages: list) -> float:
        return 0.5

    @reward
    async def one(args: RewardArgs, messages: list) -> float:
        await asyncio.sleep(0)
        return 1.0

    result = run((half, one))
    assert result == RewardResult(total=1.5, breakdown={"half": 0.5, "one": 1.0})


@pytest.mark.parametrize(
    ("value", "total"), [(0, 0.0), (0.0, 0.0), (False, 0.0), (1, 4.0), (True, 4.0)]
)
def test_a_precondition_at_zero_gives_zero(value: Any, total: float) -> None:
    @reward(precondition=True)
    def gate(args: RewardArgs, messages: list) -> float:
        return value

    @reward
    def three(args: RewardArgs, messages: list) -> float:
        return 3.0

    result = run((three, gate))
    assert result.total == total
    assert result.breakdown == {"gate": float(value), "three": 3.0}
    assert result.errors == {}


def test_a_failing_precondition_gives_zero() -> None:
    @reward(precondition=True)
    def gate(args: RewardArgs, messages: list) -> float:
        raise ValueError("no")

    @reward
    def three(args: RewardArgs, messages: list) -> float:
        return 3.0

    result = run((three, gate))
    assert result.total == 0.0
    assert list(result.errors) == ["gate"]


class _Scalar:
    def __float__(self) -> float:
        return 0.25


@pytest.mark.parametrize("value", [0.25, _Scalar()])
def test_scalars_count(value: Any) -> None:
    @reward
    def f(args: RewardArgs, messages: list) -> Any:
        return value

    assert run((f,)).total == 0.25


BAD_VALUES = [
    (None, "returned None, not a number"),
    ("0.5", "returned str '0.5', not a number"),
    (b"1", "returned bytes b'1', not a number"),
    ([1.0], "returned a list, not a number"),
    (1j, "returned a complex, not a number"),
    (float("nan"), "returned nan, not a finite number"),
    (float("inf"), "returned inf, not a finite number"),
    (10**400, "returned a int, not one number"),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("value", "words"), BAD_VALUES)
def test_what_is_not_a_number_is_reported_and_counts_zero(
    value: Any, words: str, is_async: bool
) -> None:
    @reward
    def bad(args: RewardArgs, messages: list) -> Any:
        return value

    if is_async:

        @reward
        async def bad(args: RewardArgs, messages: list) -> Any:
            return value

    @reward
    def good(args: RewardArgs, messages: list) -> float:
        return 1.0

    result = run((bad, good))
    assert result == RewardResult(
        total=1.0, breakdown={"bad": 0.0, "good": 1.0}, errors={"bad": words}
    )


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("bad\nthing"), "ValueError: bad thing (test_runner.py:"),
        (KeyError("answer"), "KeyError: 'answer' (test_runner.py:"),
        (RuntimeError("\x1b[31mred"), "RuntimeError: \\x1b[31mred (test_runner.py:"),
        (RuntimeError(), "RuntimeError (test_runner.py:"),
        (_Unprintable(), "_Unprintable (test_runner.py:"),
    ],
)
def test_what_raises_is_reported_with_its_line(
    error: Exception, words: str, is_async: bool
) -> None:
    @reward
    def bad(args: RewardArgs, messages: list) -> float:
        raise error

    if is_async:

        @reward
        async def bad(args: RewardArgs, messages: list) -> float:
            raise error

    result = run((bad,))
    assert result.total == 0.0
    assert result.errors["bad"].startswith(words)


def test_exit_does_not_end_the_run() -> None:
    @reward
    def sync_exit(args: RewardArgs, messages: list) -> float:
        raise SystemExit(3)

    @reward
    async def async_exit(args: RewardArgs, messages: list) -> float:
        raise SystemExit(3)

    result = run((sync_exit, async_exit))
    assert result.errors["sync_exit"].startswith("SystemExit: 3")
    assert "exit(3)" in result.errors["async_exit"]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end, so that threads left hanging by a test end with it."""
    event = threading.Event()
    yield event
    event.set()


def test_what_hangs_is_given_up(release: threading.Event) -> None:
    @reward(timeout=0.05)
    def hangs(args: RewardArgs, messages: list) -> float:
        release.wait(30)
        return 1.0

    @reward(timeout=0.05)
    async def waits(args: RewardArgs, messages: list) -> float:
        await asyncio.sleep(30)
        return 1.0

    @reward
    def good(args: RewardArgs, messages: list) -> float:
        return 1.0

    started = time.monotonic()
    result = run((hangs, waits, good))
    assert time.monotonic() - started < 5
    assert result.total == 1.0
    assert result.errors == {
        "hangs": "took longer than 0.05 s",
        "waits": "took longer than 0.05 s",
    }


def test_swallowing_the_cancellation_does_not_hold_the_run() -> None:
    @reward(timeout=0.05)
    async def stubborn(args: RewardArgs, messages: list) -> float:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(2)
        return 1.0

    async def timed() -> tuple[RewardResult | None, float]:
        started = time.monotonic()
        result = await RewardRunner(specs(stubborn)).score(prompt("stubborn"), rollout())
        return result, time.monotonic() - started

    result, seconds = asyncio.run(timed())
    assert result is not None
    assert result.errors == {"stubborn": "took longer than 0.05 s"}
    assert seconds < 1


def test_the_decorator_wins_over_the_default_timeout() -> None:
    @reward(timeout=5)
    def slow(args: RewardArgs, messages: list) -> float:
        time.sleep(0.1)
        return 1.0

    @reward
    async def impatient(args: RewardArgs, messages: list) -> float:
        await asyncio.sleep(1)
        return 1.0

    result = run((slow, impatient), timeout=0.03)
    assert result.breakdown == {"slow": 1.0, "impatient": 0.0}


def test_a_coroutine_that_was_returned_is_awaited() -> None:
    async def judge() -> float:
        return 0.5

    @reward
    def sync_return(args: RewardArgs, messages: list) -> Any:
        return judge()

    @reward
    async def async_return(args: RewardArgs, messages: list) -> Any:
        return judge()

    assert run((sync_return, async_return)).breakdown == {"sync_return": 0.5, "async_return": 0.5}


def test_what_a_reward_sees() -> None:
    seen: dict[str, Any] = {}

    @reward
    def look(args: RewardArgs, messages: list) -> float:
        seen.update(args=args, messages=messages)
        return 1.0

    asked = prompt("look", metadata={"answer": "4"}, variables={"n": 2})
    run((look,), asked, secrets={"KEY": "value"})
    assert seen["args"] == RewardArgs(
        metadata={"answer": "4"}, variables={"n": 2}, secrets={"KEY": "value"}
    )
    assert seen["messages"] == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    assert type(seen["messages"]) is list
    assert all(type(message) is dict for message in seen["messages"])


def test_a_reward_cannot_change_the_dataset() -> None:
    @reward
    def vandal(args: RewardArgs, messages: list) -> float:
        args.metadata["tests"].clear()  # type: ignore[index]
        args.metadata["new"] = 1  # type: ignore[index]
        messages[0]["content"][0]["text"] = "changed"
        messages.clear()
        return 1.0

    @reward
    def witness(args: RewardArgs, messages: list) -> float:
        return float(len(args.metadata["tests"]) == 2 and len(messages) == 2)

    parts = [{"type": "text", "text": "2+2?"}]
    asked = prompt(
        "vandal",
        "witness",
        metadata={"tests": [1, 2]},
        messages=({"role": "user", "content": parts},),
    )
    assert run((vandal, witness), asked).total == 2.0
    assert asked.metadata == {"tests": [1, 2]}
    assert parts == [{"type": "text", "text": "2+2?"}]


THOUGHT = {"role": "assistant", "content": "<think>2 and 2</think>\n\n4", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("include", "content", "keys"),
    [
        (False, "4", {"role", "content"}),
        (True, "<think>2 and 2</think>\n\n4", {"role", "content", "reasoning_content"}),
    ],
)
def test_thinking(include: bool, content: str, keys: set[str]) -> None:
    seen: list[dict[str, Any]] = []

    @reward
    def look(args: RewardArgs, messages: list) -> float:
        seen.extend(messages)
        return 1.0

    run((look,), answer=rollout(THOUGHT), include_thinking=include)
    assert seen[-1]["content"] == content
    assert set(seen[-1]) == keys


def test_thinking_in_the_users_words_stays() -> None:
    seen: list[dict[str, Any]] = []

    @reward
    def look(args: RewardArgs, messages: list) -> float:
        seen.extend(messages)
        return 1.0

    asked = prompt("look", messages=({"role": "user", "content": "what is <think>?"},))
    run((look,), asked)
    assert seen[0]["content"] == "what is <think>?"


def test_secrets_stay_out_of_errors() -> None:
    @reward
    def leaky(args: RewardArgs, messages: list) -> float:
        raise ValueError("key sk-12345 refused")

    errors = run((leaky,), secrets={"API_KEY": "sk-12345"}).errors
    assert "key [API_KEY] refused" in errors["leaky"]


def test_a_failed_rollout_is_shown_to_nobody() -> None:
    @reward
    def never(args: RewardArgs, messages: list) -> float:
        raise AssertionError

    answer = rollout(status="failed", error="sampler died")
    assert run((never,), answer=answer) == RewardResult(
        total=0.0, errors={"rollout": "sampler died"}
    )


def test_an_unknown_reward_is_the_users_error() -> None:
    with pytest.raises(DataError, match="missing"):
        asyncio.run(RewardRunner({}).score(prompt("missing"), rollout()))


def test_cancelling_the_score_cancels_the_reward() -> None:
    ended: list[str] = []

    @reward
    async def waits(args: RewardArgs, messages: list) -> float:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return 1.0

    async def stop() -> None:
        task = asyncio.create_task(RewardRunner(specs(waits)).score(prompt("waits"), rollout()))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert ended == ["cancelled"]

    asyncio.run(stop())


def test_one_runner_serves_several_event_loops() -> None:
    @reward
    def one(args: RewardArgs, messages: list) -> float:
        return 1.0

    runner = RewardRunner(specs(one))
    for _ in range(2):
        result = asyncio.run(runner.score(prompt("one"), rollout()))
        assert result is not None
        assert result.total == 1.0
