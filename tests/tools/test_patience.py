"""Deadlines on an event loop that somebody else keeps busy."""

from __future__ import annotations

import asyncio
import time

import pytest

from rnow.tools.mcp_connection import Connection
from rnow.tools.patience import ended_within


def test_in_time_too_late_and_no_time_at_all() -> None:
    async def body() -> None:
        start = time.monotonic()
        late = [asyncio.create_task(asyncio.sleep(0.6)) for _ in range(3)]
        assert not await ended_within(late[0], 0.0)
        assert not await ended_within(late[1], -1.0)
        assert not await ended_within(late[2], 0.3)
        assert 0.3 <= time.monotonic() - start < 0.55
        await asyncio.sleep(0)
        assert all(task.cancelled() for task in late)
        task = asyncio.create_task(asyncio.sleep(0.1))
        assert await ended_within(task, 5.0)
        assert not task.cancelled()
        assert time.monotonic() - start < 1.0
        assert await ended_within(task, 0.0)

    asyncio.run(body())


def test_whoever_waits_takes_the_task_along() -> None:
    async def body() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        waiting = asyncio.create_task(ended_within(task, 60))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting, task}, timeout=1)
        assert waiting.cancelled()
        assert task.cancelled()

    asyncio.run(body())


def test_a_request_is_not_late_because_the_loop_was_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a model samples on the CPU between a server's answer and our reading it."""
    connection = Connection(None, on_change=lambda: None)  # type: ignore[arg-type]
    monkeypatch.setattr(Connection, "alive", True)
    connection._client = object()  # type: ignore[assignment]

    async def answer(client: object) -> str:
        for _ in range(10):  # from the socket through the client's streams
            await asyncio.sleep(0)
        return "answer"

    async def body() -> None:
        request = asyncio.ensure_future(connection.request(answer, 1.0))
        for _ in range(3):
            await asyncio.sleep(0)
        for _ in range(2):
            time.sleep(0.6)
            await asyncio.sleep(0)
        assert await request == "answer"

    asyncio.run(body())
