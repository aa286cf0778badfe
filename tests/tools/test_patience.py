"""Deadlines on an event loop that somebody else keeps busy."""

from __future__ import annotations

import asyncio
import time

import pytest

from rnow.tools.mcp_connection import Connection
from rnow.tools.patience import done_within


def test_in_time_too_late_and_no_time_at_all() -> None:
    async def body() -> None:
        start = time.monotonic()
        task = asyncio.ensure_future(asyncio.sleep(0.6))
        assert not await done_within(task, 0.0)
        assert not await done_within(task, -1.0)
        assert not await done_within(task, 0.3)
        assert 0.3 <= time.monotonic() - start < 0.55
        assert not task.cancelled()
        assert await done_within(task, 5.0)
        assert time.monotonic() - start < 1.0
        assert await done_within(task, 0.0)

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
