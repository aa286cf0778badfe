"""Who has the card: one part at a time where it is shared in turns, all of them where it is not; and how long each stage takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Literal, Protocol, runtime_checkable

Part = Literal["sampler", "teacher", "trainer"]


class StageClock:
    """Adds up seconds under the name of each stage.

    Args:
        on_start: told the name of each stage as it begins.
    """

    def __init__(self, on_start: Callable[[str], None] = lambda name: None) -> None:
        self._on_start = on_start
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._noted: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block as ``time/<name>``."""
        self._on_start(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def note(self, values: Mapping[str, float]) -> None:
        """Add metrics that were measured between stages; the largest of each counts."""
        for name, value in values.items():
            self._noted[name] = max(value, self._noted.get(name, value))

    def metrics(self) -> dict[str, float]:
        """``time/<stage>`` for each stage and ``time/step`` since the clock was made, in seconds, and what was noted."""
        stages = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return self._noted | stages | {"time/step": time.perf_counter() - self._started}


@runtime_checkable
class Sleeper(Protocol):
    """Something that can leave the card and come back. Both calls do nothing where there is nothing to do, and after a
    failure or a cancellation either may be called again."""

    async def sleep(self) -> None:
        """Free the card; what was there is kept in main memory."""
        ...

    async def wake(self) -> None:
        """Take the card again, with the same numbers as before."""
        ...


class Residency:
    """``only(part)`` around everything that computes on the card.

    Parts that were added take turns: the one that is asked for is awake, the others sleep, and it stays awake until another
    is asked for. A part that was not added has a card of its own, or needs none: it changes nothing. Without any, nothing
    ever happens here.

    Args:
        measure: asked whenever every part sleeps, the one moment at which nothing of theirs should be on the card; gives
            metrics, may raise.
    """

    def __init__(self, measure: Callable[[], Mapping[str, float]] = dict) -> None:
        self._sleepers: dict[Part, Sleeper] = {}
        self._user: Part | None = None
        self._measure = measure
        self._awake: Sleeper | None = None

    def add(self, part: Part, sleeper: Sleeper) -> None:
        """``sleeper``, awake now, takes turns from now on. Several parts may be one sleeper: the embedded sampler draws with
        the trainer's weights."""
        self._sleepers[part] = sleeper
        self._awake = sleeper

    @asynccontextmanager
    async def only(self, part: Part, clock: StageClock | None = None) -> AsyncIterator[None]:
        """Have ``part`` awake, alone, for the block.

        Args:
            clock: where ``time/sleep_<part>`` and ``time/wake_<part>`` go.

        Raises:
            RuntimeError: inside another such block.
            RnowError: a part does not wake. Nothing of this is undone: the next ``only`` goes on from where it is.
        """
        if self._user is not None:
            raise RuntimeError(f"{part} asks for the card while {self._user} works on it")
        self._user = part
        try:
            wanted = self._sleepers.get(part)
            if wanted is not None:
                await self._sleep(clock, but=wanted)
                if wanted is not self._awake:
                    found = self._measure()
                    if clock is not None:
                        clock.note(found)
                with clock.stage(f"wake_{part}") if clock else nullcontext():
                    await wanted.wake()
                self._awake = wanted
            yield
        finally:
            self._user = None

    async def clear(self) -> None:
        """Put every part to sleep: the one that is about to be loaded needs the card."""
        await self._sleep(None, but=None)
        self._awake = None
        if self._sleepers:
            self._measure()

    async def _sleep(self, clock: StageClock | None, *, but: Sleeper | None) -> None:
        done = [but]
        for part, sleeper in self._sleepers.items():
            if not any(sleeper is other for other in done):
                done.append(sleeper)
                with clock.stage(f"sleep_{part}") if clock else nullcontext():
                    await sleeper.sleep()
