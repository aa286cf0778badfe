"""Drawing together, probing alone: who is inside beside whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rnow.sampling.gate import Gate


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scene(), timeout=5)

    asyncio.run(bounded())


class Visitor:
    """A task that stays inside until ``leave`` is set."""

    def __init__(self, gate: Gate, kind: str) -> None:
        self.inside = False
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(gate, kind))

    async def _visit(self, gate: Gate, kind: str) -> None:
        async with gate.alone() if kind == "alone" else gate.shared():
            self.inside = True
            await self.leave.wait()
        self.inside = False

    async def gone(self) -> None:
        self.leave.set()
        await self.task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_many_draw_at_once() -> None:
    async def scene() -> None:
        gate = Gate()
        visitors = [Visitor(gate, "shared") for _ in range(3)]
        await settle()
        assert all(visitor.inside for visitor in visitors)
        for visitor in visitors:
            await visitor.gone()

    run(scene)


def test_a_new_gate_lets_one_in_alone() -> None:
    async def scene() -> None:
        visitor = Visitor(Gate(), "alone")
        await settle()
        assert visitor.inside
        await visitor.gone()

    run(scene)


def test_alone_waits_for_the_last_who_draws_and_keeps_the_next_ones_waiting() -> None:
    async def scene() -> None:
        gate = Gate()
        first, second = Visitor(gate, "shared"), Visitor(gate, "shared")
        await settle()
        alone = Visitor(gate, "alone")
        await settle()
        late = Visitor(gate, "shared")
        await first.gone()
        await settle()
        assert (second.inside, alone.inside, late.inside) == (True, False, False)
        await second.gone()
        await settle()
        assert (alone.inside, late.inside) == (True, False)
        await alone.gone()
        await settle()
        assert late.inside
        await late.gone()
        # And the count is right after all of them: the next one waits again.
        again = Visitor(gate, "shared")
        await settle()
        probe = Visitor(gate, "alone")
        await settle()
        assert (again.inside, probe.inside) == (True, False)
        await again.gone()
        await settle()
        assert probe.inside
        await probe.gone()

    run(scene)


@pytest.mark.parametrize("kind", ["shared", "alone"])
def test_a_failure_inside_leaves_the_gate_open(kind: str) -> None:
    async def scene() -> None:
        gate = Gate()
        with pytest.raises(ZeroDivisionError):
            async with gate.alone() if kind == "alone" else gate.shared():
                raise ZeroDivisionError
        visitor = Visitor(gate, "alone")
        await settle()
        assert visitor.inside
        await visitor.gone()

    run(scene)
