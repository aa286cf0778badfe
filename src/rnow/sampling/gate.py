"""Drawing together, probing alone.

Prompt log-probabilities beside other requests kill a LoRA-enabled engine of vLLM's CPU build, and an adapter must not be
exchanged under a request that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Many may draw at once; whoever asks to be alone waits for them and keeps the next ones waiting."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._drawing = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Enter beside others."""
        async with self._turn:
            self._drawing += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._drawing -= 1
            if not self._drawing:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Enter when everybody has left."""
        async with self._turn:
            await self._idle.wait()
            yield
