"""The owner's side of ``to_markdown.py``: one warm process, killed when a page takes too long, started again for the
next."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

_SCRIPT = Path(__file__).with_name("to_markdown.py")
_START_SECONDS = 60.0
_MAX_ANSWER = 256 * 1024 * 1024


class ConversionError(Exception):
    """The page could not be turned into text; the message says why."""


class Converter:
    """Turns HTML into markdown, one page at a time. Belongs to one event loop."""

    def __init__(self, script: Path = _SCRIPT) -> None:
        self._script = script
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def convert(self, html: str, base: str, *, timeout: float) -> str:
        """Markdown of ``html``; ``base`` makes its links absolute. ``timeout`` (seconds) is for this page alone, not for
        those before it or for the start of the process.

        Raises ConversionError: too slow, too big for its memory, or the process cannot start.
        """
        if timeout <= 0:  # a page that came too late must not cost the others the process
            raise ConversionError("no time is left to turn it into text")
        async with self._lock:
            process = await self._ready()
            try:
                async with asyncio.timeout(timeout):
                    answer = await _ask(process, {"html": html, "base": base})
            except TimeoutError:
                await self.close()
                raise ConversionError("it takes too long to turn into text") from None
            except (OSError, EOFError):
                await self.close()
                raise ConversionError("it is too much to turn into text") from None
            except asyncio.CancelledError:
                await self.close()  # its answer would be taken for the next page's
                raise
        if "text" not in answer:
            raise ConversionError("it cannot be turned into text")
        return answer["text"]

    async def start(self) -> None:
        """Have the process running, so that the first page need not wait for it. Raises ConversionError."""
        async with self._lock:
            await self._ready()

    async def _ready(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(self._script),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        try:
            async with asyncio.timeout(_START_SECONDS):
                hello = await _receive(process)
        except (OSError, EOFError):  # TimeoutError is an OSError
            hello = {"error": "its process ended"}
        except asyncio.CancelledError:
            await self.close()
            raise
        if "error" in hello:
            await self.close()
            raise ConversionError(f"crawl4ai does not start: {hello['error']}")
        return process

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, request: dict[str, str]) -> dict[str, str]:
    assert process.stdin is not None
    data = json.dumps(request).encode("ascii")
    process.stdin.write(len(data).to_bytes(4, "big") + data)
    await process.stdin.drain()
    return await _receive(process)


async def _receive(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    size = int.from_bytes(await process.stdout.readexactly(4), "big")
    if size > _MAX_ANSWER:
        raise EOFError
    return json.loads(await process.stdout.readexactly(size))
