"""Small things that asyncio lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def run_anywhere(work: Coroutine[object, object, T]) -> T:
    """``asyncio.run``, also from inside a running loop (a notebook): then in a thread with a loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


def first_cause(failures: BaseExceptionGroup) -> BaseException:
    """What went wrong first in a task group."""
    error = failures.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def ask_again(
    ask: Callable[[], Awaitable[T]],
    *,
    lost: type[E],
    starts: Callable[[], int],
    restart: Callable[[int, E], Awaitable[None]],
) -> T:
    """The answer of ``ask``, asked again after each restart of what it asks. Any number may ask at once.

    Args:
        lost: the error of ``ask`` that a restart may mend.
        starts: how often the asked one was started.
        restart: starts it again, unless that has happened since ``starts`` gave this number; raises to give up.
    """
    while True:
        seen = starts()
        try:
            return await ask()
        except lost as error:
            failure = error
        await restart(seen, failure)
