"""ThreadLane: short calls together, slow calls side by side, hanging calls left behind but counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from rnow.rewards.threads import CallTimeout, HangingCalls, ThreadLane


def in_lane(body: Callable[[ThreadLane], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        return await body(ThreadLane(asyncio.get_running_loop()))

    return asyncio.run(main())


def lane_threads() -> int:
    return sum(thread.name.startswith("reward-") for thread in threading.enumerate())


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 5
    while lane_threads() and time.monotonic() < deadline:
        time.sleep(0.005)


def test_short_calls_share_one_thread_and_keep_their_order() -> None:
    threads: set[int] = set()
    order: list[int] = []

    def note(number: int) -> int:
        threads.add(threading.get_ident())
        order.append(number)
        return number * 2

    async def body(lane: ThreadLane) -> list[int]:
        return await asyncio.gather(*(lane.call(note, n, timeout=5) for n in range(200)))

    assert in_lane(body) == [n * 2 for n in range(200)]
    assert order == list(range(200))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_slow_calls_run_side_by_side() -> None:
    async def body(lane: ThreadLane) -> float:
        started = time.monotonic()
        await asyncio.gather(*(lane.call(time.sleep, 0.2, timeout=5) for _ in range(8)))
        return time.monotonic() - started

    assert in_lane(body) < 8 * 0.2 / 2


def test_an_idle_lane_has_no_thread(release: threading.Event) -> None:
    async def body(lane: ThreadLane) -> None:
        await asyncio.gather(*(lane.call(abs, -1, timeout=5) for _ in range(10)))

    in_lane(body)
    deadline = time.monotonic() + 5
    while lane_threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert lane_threads() == 0


def test_a_hanging_call_does_not_hold_those_behind_it(release: threading.Event) -> None:
    async def body(lane: ThreadLane) -> list[Any]:
        calls = [lane.call(release.wait, 30, timeout=0.1)]
        calls += [lane.call(abs, -n, timeout=5) for n in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = in_lane(body)
    assert isinstance(first, CallTimeout)
    assert others == list(range(5))


def test_waiting_for_a_thread_is_not_running() -> None:
    async def body(lane: ThreadLane) -> list[Any]:
        calls = (lane.call(time.sleep, 0.06, timeout=0.5) for _ in range(64))
        return await asyncio.gather(*calls)

    assert in_lane(body) == [None] * 64


def test_a_function_that_always_hangs_stops_being_called(release: threading.Event) -> None:
    calls = 0

    def hang() -> None:
        nonlocal calls
        calls += 1
        release.wait(30)

    async def body(lane: ThreadLane) -> list[Any]:
        many = (lane.call(hang, timeout=0.05) for _ in range(200))
        return await asyncio.gather(*many, return_exceptions=True)

    results = in_lane(body)
    kinds = {type(result) for result in results}
    assert kinds == {CallTimeout, HangingCalls}
    assert calls <= 16
    assert lane_threads() <= 16


def test_a_function_that_came_back_is_called_again(release: threading.Event) -> None:
    async def body(lane: ThreadLane) -> bool:
        hung = [lane.call(release.wait, 30, timeout=0.05) for _ in range(8)]
        await asyncio.gather(*hung, return_exceptions=True)
        with pytest.raises(HangingCalls):
            await lane.call(release.wait, 30, timeout=0.05)
        release.set()
        while lane_threads():
            await asyncio.sleep(0.005)
        return await lane.call(release.wait, 30, timeout=5)

    # Bound methods are equal when they bind the same object, so the count is kept under one key.
    assert in_lane(body) is True


def test_a_cancelled_call_is_skipped(release: threading.Event) -> None:
    ran: list[int] = []

    async def body(lane: ThreadLane) -> None:
        blocker = asyncio.ensure_future(lane.call(time.sleep, 0.01, timeout=5))
        waiting = asyncio.ensure_future(lane.call(ran.append, 1, timeout=5))
        await asyncio.sleep(0)
        waiting.cancel()
        await blocker
        await lane.call(abs, 1, timeout=5)

    in_lane(body)
    assert ran == []


def test_what_a_call_raises_is_raised() -> None:
    async def body(lane: ThreadLane) -> None:
        await lane.call(int, "x", timeout=5)

    with pytest.raises(ValueError, match="invalid literal"):
        in_lane(body)
