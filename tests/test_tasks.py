"""Running a coroutine from anywhere, and asking again after a restart."""

from __future__ import annotations

import asyncio

import pytest

from rnow.tasks import ask_again, run_anywhere


async def seven() -> int:
    await asyncio.sleep(0)
    return 7


def test_run_anywhere_works_inside_and_outside_a_loop() -> None:
    async def inside() -> int:
        return run_anywhere(seven())

    assert run_anywhere(seven()) == 7
    assert asyncio.run(inside()) == 7


class Lost(Exception):
    pass


def test_many_who_lost_an_answer_share_one_restart_and_ask_again() -> None:
    starts, asked = 1, 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        seen = starts
        await asyncio.sleep(0)
        if seen == 1:
            raise Lost
        return starts

    async def restart(seen: int, error: Lost) -> None:
        nonlocal starts
        if seen == starts:
            starts += 1

    async def everything() -> list[int]:
        return await asyncio.gather(
            *(ask_again(ask, lost=Lost, starts=lambda: starts, restart=restart) for _ in range(3))
        )

    assert asyncio.run(everything()) == [2, 2, 2]
    assert asked == 6


def test_a_restart_that_gives_up_and_other_errors_are_raised() -> None:
    async def lost() -> int:
        raise Lost("gone")

    async def wrong() -> int:
        raise KeyError

    async def give_up(seen: int, error: Lost) -> None:
        raise error

    with pytest.raises(Lost, match="gone"):
        asyncio.run(ask_again(lost, lost=Lost, starts=lambda: 0, restart=give_up))
    with pytest.raises(KeyError):
        asyncio.run(ask_again(wrong, lost=Lost, starts=lambda: 0, restart=give_up))
