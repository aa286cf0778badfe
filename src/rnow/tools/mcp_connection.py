"""One connection to an MCP server, kept by a task of its own.

The official client holds cancel scopes, which must be left by the task that entered them: so one task enters and leaves it,
and calls come from wherever they come, each in a task of its own that a deadline can leave behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from rnow import __version__
from rnow.errors import InputError
from rnow.text.install import install_command
from rnow.tools.patience import ended_within

if TYPE_CHECKING:
    from mcp import Client
    from mcp.client import Transport

_T = TypeVar("_T")
_CLOSE_LIMIT = 8.0
_LOGGERS = ("mcp", "client", "httpx2", "httpcore2")


def require_client() -> None:
    """Raises InputError when the official client is not installed, or is not of the generation that this speaks to."""
    try:
        import httpx2  # noqa: F401
        import mcp_types  # noqa: F401
        from mcp import Client  # noqa: F401
    except ImportError as error:
        raise InputError(
            "rollout.mcp_url needs the MCP client",
            title="Missing package",
            why=f"importing mcp 2 or later failed: {error}",
            fix=install_command("mcp"),
        ) from None
    for name in _LOGGERS:
        # It logs what servers send, and Python prints that to the terminal unless a handler takes it.
        logger = logging.getLogger(name)
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


class Connection:
    """A connection that is entered, used by many, and left.

    Args:
        transport: a transport of the official client, not yet entered.
        on_change: called when the server says that its list of tools changed.
    """

    def __init__(self, transport: Transport, *, on_change: Callable[[], None]) -> None:
        self._transport = transport
        self._on_change = on_change
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[object]] = set()
        self._client: Client | None = None

    @property
    def alive(self) -> bool:
        """Whether requests can be made. A lost connection may still look alive until a request finds out."""
        return self._client is not None and self._task is not None and not self._task.done()

    @property
    def in_flight(self) -> int:
        """Requests that wait for their answer."""
        return len(self._calls)

    async def start(self, timeout: float) -> None:
        """Connect and agree on a protocol version.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds.
            Exception: whatever went wrong, the first of a group.
        """
        self._task = asyncio.create_task(self._run())
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait(
                {self._task, ready}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        except BaseException:
            await self.stop()
            raise
        finally:
            ready.cancel()
        if self._ready.is_set():
            return
        ended = self._task.done()
        await self.stop()
        if not ended:
            raise TimeoutError
        error = None if self._task.cancelled() else self._task.exception()
        raise first_error(error) if error else ConnectionError("the connection was closed")

    async def request(self, make: Callable[[Client], Awaitable[_T]], timeout: float) -> _T:
        """``make(client)``, within ``timeout`` seconds of a free event loop, whatever the client does.

        Raises:
            TimeoutError: no answer in time; the request is told to end and left behind.
            ConnectionError: the connection is gone.
            Exception: what the client raised.
        """
        client = self._client
        if client is None or not self.alive:
            raise ConnectionError("the connection is gone")

        async def run() -> _T:
            return await make(client)

        task = asyncio.create_task(run())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        if not await ended_within(task, timeout):
            raise TimeoutError
        if task.cancelled():
            raise ConnectionError("the connection was closed")
        return task.result()

    async def stop(self) -> None:
        """Leave: requests end first, then the client, a command's processes included; idempotent."""
        for call in list(self._calls):
            call.cancel()
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=_CLOSE_LIMIT)
        self._leave.set()
        task = self._task
        if task is None or task.done():
            return
        if not self._ready.is_set():
            task.cancel()
        for _ in range(3):
            done, _ = await asyncio.wait({task}, timeout=_CLOSE_LIMIT)
            if done:
                return
            task.cancel()

    async def _run(self) -> None:
        from mcp import Client
        from mcp_types import Implementation

        client = Client(
            self._transport,
            cache=None,
            client_info=Implementation(name="rnow", version=__version__),
            message_handler=self._notice,
        )
        try:
            async with client:
                # The client would run the output schemas of the server, and with them its regular expressions.
                client.session.validate_tool_result = _leave_unchecked  # type: ignore[method-assign]
                self._client = client
                self._ready.set()
                listening = asyncio.create_task(self._listen(client))
                try:
                    await self._leave.wait()
                finally:
                    listening.cancel()
                    await asyncio.wait({listening}, timeout=1.0)
        except Exception:
            if not self._ready.is_set():
                raise
            # Lost later: the requests that waited know already, and the next one connects again.
        finally:
            self._client = None

    async def _listen(self, client: Client) -> None:
        """Changes of the list as servers of the 2026 protocol tell them; older ones tell ``_notice``, or nobody."""
        with contextlib.suppress(Exception):
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self._on_change()

    async def _notice(self, message: object) -> None:
        import mcp_types

        if isinstance(message, mcp_types.ToolListChangedNotification):
            with contextlib.suppress(Exception):
                self._on_change()


async def _leave_unchecked(name: str, result: object) -> None:
    """Takes the place of the client's check of a result against the tool's output schema."""


def first_error(error: BaseException) -> BaseException:
    """The first ordinary error of a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        ordinary = [e for e in error.exceptions if not isinstance(e, asyncio.CancelledError)]
        error = (ordinary or list(error.exceptions))[0]
    return error
