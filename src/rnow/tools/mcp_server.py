"""One MCP server for the length of a run: its tools as they were at the start, and calls that always get an answer."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.errors import ConfigError, InputError
from rnow.protocols import Tool
from rnow.tools.arguments import ArgumentChecker, SchemaProblem
from rnow.tools.limits import storable
from rnow.tools.mcp_address import McpAddress, parse_address, shown
from rnow.tools.mcp_connection import Connection, first_error, require_client
from rnow.tools.mcp_content import read_result
from rnow.tools.mcp_transport import CommandEnded, open_command, open_http
from rnow.tools.patience import look_at
from rnow.types import ToolContext, ToolResult

if TYPE_CHECKING:
    from mcp.client import Transport
    from mcp_types import Tool as ServerTool

MAX_TOOLS = 256
MAX_PAGES = 200
MAX_SCHEMA_CHARACTERS = 64_000
MAX_DESCRIPTION_CHARACTERS = 4_000

# What every format of calls and every chat template can carry.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CONNECT_SECONDS = 60.0  # the command, the first answer and the list
_LOOK_AGAIN = 10.0
_LOOK_LIMIT = 10.0
_MAX_PAUSE = 30.0
_READ_SLACK = 30.0

_log = logging.getLogger("rnow")


@dataclass(frozen=True, slots=True, kw_only=True)
class McpTool:
    """A tool of an MCP server, as it was when the run began. ``parameters`` is plain JSON of our own."""

    server: McpServer = field(repr=False)
    name: str
    description: str
    parameters: Mapping[str, object]
    timeout: float
    starting: float = 0.0

    async def call(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        return await self.server.call(self.name, arguments)


class McpServer:
    """A server and its tools. A source of ``rnow.tools.toolbox.Toolbox``.

    The list of tools is pinned when it opens and looked at again before a call when ten seconds have passed, the server
    said that it changed, or something went wrong: a tool that is gone, or takes other parameters than the student was shown, is
    answered with a failure and warned of once. New tools are ignored. A lost connection is made again for the next call, never
    for the one that was lost: it may have had its effect.

    Args:
        timeout: seconds for one call, everything included (``rollout.tool_timeout``).
        log_dir: for the stderr of a command (``mcp-<number>.log``); None keeps none.
        number: of this server among the run's, from 0.
        warn: told about what does not stop the run.
    """

    def __init__(
        self,
        address: McpAddress,
        *,
        timeout: float = 60.0,
        log_dir: Path | None = None,
        number: int = 0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self._log_dir = log_dir
        self._number = number
        self._warn = warn or _log.warning
        self._warned: set[str] = set()
        self._pinned: dict[str, McpTool] = {}
        self._forget_connection()

    @property
    def label(self) -> str:
        """The server in messages."""
        return f"the MCP server {self.address.label}"

    async def open(self) -> Sequence[Tool]:
        """Connect, and pin the tools, sorted by name.

        Raises:
            InputError: the server is not there, hangs, or offers no tool that can be used.
        """
        self._forget_connection()
        try:
            connection, listed = await self._connect(_CONNECT_SECONDS)
        except _Unreachable as error:
            raise InputError(
                f"{self.label} cannot be used",
                title="MCP server",
                where="rollout.mcp_url",
                details=error.tried,
                fix="start it, or correct the address"
                if self.address.urls
                else "run the command by itself and see what it says",
            ) from None
        self._connection = connection
        tools: dict[str, McpTool] = {}
        for raw in listed:
            if raw.name not in tools and (tool := self._admit(raw)):
                tools[raw.name] = tool
        self._pinned = dict(sorted(tools.items()))
        if not tools:
            await self.close()
            raise InputError(
                f"{self.label} offers no tool that can be used",
                title="MCP server",
                where="rollout.mcp_url",
                fix="remove it from mcp_url, or look at the warnings above",
            )
        self._looked_at = self._answered_at = time.monotonic()
        return list(self._pinned.values())

    async def close(self) -> None:
        """Disconnect; a command ends with all its processes; idempotent."""
        connection = self._connection
        tasks = {task for task in (self._connecting, self._looking) if task is not None}
        self._forget_connection()
        self._closed = True
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if connection is not None:
            await connection.stop()

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult:
        """Call a pinned tool. Whatever the server does, there is an answer within ``timeout`` and a moment."""
        deadline = time.monotonic() + self.timeout
        try:
            connection = await self._current(deadline)
            if name in self._gone:
                return _failed(f"{name} is no longer offered by its server")
            if name in self._changed:
                return _failed(
                    f"{name} has changed on its server since this run began and is not called any more"
                )
            result = await connection.request(
                lambda client: client.call_tool(name, dict(arguments)), deadline - time.monotonic()
            )
            self._answered_at = time.monotonic()
            if result.is_error:
                self._looked_at = -math.inf  # perhaps because the tool is not what it was
            return read_result(result)
        except TimeoutError:
            self._suspect = True
            return _failed(f"{name} took longer than {self.timeout:g} s")
        except _Unreachable as error:
            return _failed("the tool's server cannot be reached", "\n".join(error.tried))
        except Exception as error:
            self._suspect = True
            return self._lost_call(name, first_error(error))

    def _lost_call(self, name: str, error: BaseException) -> ToolResult:
        from mcp_types import CONNECTION_CLOSED

        detail = f"{type(error).__name__}: {error}"
        code = getattr(error, "code", None)
        if code == CONNECTION_CLOSED or isinstance(error, OSError):
            self._broken = True
            return _failed("the connection to the tool's server was lost during the call", detail)
        if code is not None:
            return _failed(f"the server refused the call of {name}: {error}", detail)
        return _failed(f"the server's answer to {name} could not be read", detail)

    async def _current(self, deadline: float) -> Connection:
        """A connection that works as far as we know, with the list looked at lately."""
        connection = self._connection
        if connection is not None and connection.alive and not self._broken:
            due = time.monotonic() - self._looked_at >= _LOOK_AGAIN
            if (due or self._suspect) and (self._looking is None or self._looking.done()):
                self._looking = asyncio.create_task(self._look(connection))
            if not self._suspect or self._looking is None:
                return connection  # a look that is merely due goes on beside the call
            done, _ = await asyncio.wait({self._looking}, timeout=deadline - time.monotonic())
            if not done:
                raise TimeoutError
            if connection.alive and not self._broken:
                return connection
        return await self._reconnect(deadline)

    async def _look(self, connection: Connection) -> None:
        """List the tools again, and find out on the way whether the server still answers."""
        self._looked_at = time.monotonic()
        try:
            self._compare(await self._list(connection, min(_LOOK_LIMIT, self.timeout)))
        except TimeoutError:
            # Slow, or stuck? While others got answers lately it is only busy.
            lately = time.monotonic() - self._answered_at < self.timeout
            if not (connection.in_flight and lately):
                self._broken = True
        except Exception:  # whatever it is, a new connection is the way out
            self._broken = True
        finally:
            self._suspect = False

    async def _reconnect(self, deadline: float) -> Connection:
        """One attempt, shared by all calls that wait for it, after a pause that grows."""
        now = time.monotonic()
        if self._connecting is None or self._connecting.done():
            if self._closed:
                raise _Unreachable(["the run is ending"])
            if now < self._retry_at:
                left = self._retry_at - now
                raise _Unreachable([f"it was lost; the next attempt is in {left:.0f} s"])
            self._connecting = asyncio.create_task(self._connect_again())
            self._connecting.add_done_callback(look_at)
        task = self._connecting
        done, _ = await asyncio.wait({task}, timeout=max(0.0, deadline - now))
        if not done:
            raise _Unreachable(["connecting to it again takes too long"])
        if task.cancelled():
            raise _Unreachable(["the run is ending"])
        return task.result()

    async def _connect_again(self) -> Connection:
        old, self._connection = self._connection, None
        self._broken = False
        if old is not None:
            await old.stop()
        try:
            connection, listed = await self._connect(_CONNECT_SECONDS)
        except _Unreachable as error:
            self._pause = min(_MAX_PAUSE, self._pause * 2)
            self._retry_at = time.monotonic() + self._pause
            self._warn_once("lost", f"{self.label} was lost: {error.tried[-1]}")
            raise
        if self._closed:
            await connection.stop()
            raise _Unreachable(["the run is ending"])
        self._connection = connection
        self._broken = self._suspect = False
        self._pause = 1.0
        self._looked_at = self._answered_at = time.monotonic()
        self._compare(listed)
        return connection

    async def _connect(self, timeout: float) -> tuple[Connection, list[ServerTool]]:
        """Connect and list, at the first address that answers."""
        tried: list[str] = []
        deadline = time.monotonic() + timeout
        places: Sequence[str | None] = self.address.urls or (None,)
        for index, url in enumerate(places):
            left = (deadline - time.monotonic()) / (len(places) - index)
            if left <= 0:
                break
            statuses: list[int] = []
            if url is None:
                transport: Transport = open_command(
                    self.address, log_dir=self._log_dir, number=self._number
                )
            else:
                patience = self.timeout + _READ_SLACK
                transport = open_http(url, read_timeout=patience, on_status=statuses.append)
            connection = Connection(transport, on_change=self._list_changed)
            start = time.monotonic()
            try:
                await connection.start(left)
                return connection, await self._list(connection, left - (time.monotonic() - start))
            except Exception as error:
                await connection.stop()
                tried += _describe(shown(url) if url else None, first_error(error), left, statuses)
            except BaseException:
                await connection.stop()
                raise
        raise _Unreachable(tried)

    async def _list(self, connection: Connection, timeout: float) -> list[ServerTool]:
        deadline = time.monotonic() + timeout
        tools: list[ServerTool] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await connection.request(
                lambda client, cursor=cursor: client.list_tools(cursor=cursor),
                deadline - time.monotonic(),
            )
            tools += page.tools
            cursor = page.next_cursor
            if len(tools) > MAX_TOOLS:
                raise ValueError(f"it lists more than {MAX_TOOLS} tools")
            if not cursor:
                return tools
        raise ValueError(f"its list of tools has more than {MAX_PAGES} pages")

    def _admit(self, raw: ServerTool) -> McpTool | None:
        """A listed tool, or None and a warning for one that cannot be shown to a student."""
        if not _NAME.fullmatch(raw.name):
            self._warn_once(
                f"name {raw.name[:200]}",
                f"{self.label}: {raw.name[:80]!r} is left out, its name cannot stand in a call",
            )
            return None
        try:
            return self._plain(raw)
        except (ValueError, RecursionError) as problem:
            self._warn_once(
                f"schema {raw.name}",
                f"{self.label}: {raw.name} is left out, its schema cannot be used: {problem}",
            )
            return None

    def _plain(self, raw: ServerTool) -> McpTool:
        text = json.dumps(raw.input_schema, ensure_ascii=False, allow_nan=False)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise SchemaProblem(f"it is longer than {MAX_SCHEMA_CHARACTERS:,} characters")
        parameters = json.loads(storable(text))
        ArgumentChecker(parameters)
        description = storable(raw.description or raw.title or "")
        return McpTool(
            server=self,
            timeout=self.timeout,
            name=raw.name,
            description=description[:MAX_DESCRIPTION_CHARACTERS],
            parameters={"type": "object", "properties": {}} | parameters,
        )

    def _compare(self, listed: Sequence[ServerTool]) -> None:
        """What the list says now against what was pinned. Descriptions may change: the student keeps the first."""
        now = {raw.name: raw for raw in reversed(listed)}  # the first of a name, as at the start
        self._gone = {name for name in self._pinned if name not in now}
        self._changed = set()
        for name in self._pinned.keys() - self._gone:
            try:
                same = self._plain(now[name]).parameters == self._pinned[name].parameters
            except (ValueError, RecursionError):
                same = False
            if not same:
                self._changed.add(name)
        for name in sorted(self._gone):
            self._warn_once(f"gone {name}", f"{self.label} no longer offers {name}: its calls fail")
        for name in sorted(self._changed):
            self._warn_once(
                f"changed {name}",
                f"{self.label} changed the parameters of {name} since the run began: its calls fail",
            )

    def _list_changed(self) -> None:
        self._suspect = True

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._warn(message)

    def _forget_connection(self) -> None:
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self._broken = False
        self._suspect = False
        self._gone: set[str] = set()
        self._changed: set[str] = set()
        self._looked_at = 0.0
        self._answered_at = time.monotonic()
        self._retry_at = 0.0
        self._pause = 1.0


class _Unreachable(Exception):
    """A server that could not be reached; ``tried`` says where and what happened, a line each."""

    def __init__(self, tried: Sequence[str]) -> None:
        super().__init__("; ".join(tried))
        self.tried = list(tried) or ["no time was left to try"]


def _failed(message: str, detail: str | None = None) -> ToolResult:
    return ToolResult(
        content=f"Error: {' '.join(message.split())[:500]}", failed=True, detail=detail
    )


def _describe(
    place: str | None, error: BaseException, timeout: float, statuses: Sequence[int]
) -> list[str]:
    """Lines that say what went wrong at one address."""
    lines: list[str] = []
    if isinstance(error, TimeoutError):
        text = f"no answer within {timeout:.2g} s"
    elif isinstance(error, CommandEnded):
        text = str(error)
        lines = [f"  {line[:200]}" for line in error.log[-10:]]
    elif statuses:
        text = f"HTTP {statuses[-1]} ({error})"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())[:300]
    return [f"{place}: {text}" if place else text, *lines]


def mcp_servers(
    urls: Sequence[str],
    *,
    timeout: float = 60.0,
    secrets: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[McpServer]:
    """The servers of ``rollout.mcp_url``, not connected yet. ``secrets`` as for ``parse_address``, the rest as for McpServer.

    Raises:
        InputError: the client is not installed.
        ConfigError: an entry has no meaning, or stands there twice.
    """
    if not urls:
        return []
    require_client()
    addresses = [parse_address(url, secrets) for url in urls]
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            raise ConfigError(
                f"{address.label} stands there twice", where="rollout.mcp_url", fix="remove one"
            )
    return [
        McpServer(address, timeout=timeout, log_dir=log_dir, number=number, warn=warn)
        for number, address in enumerate(addresses)
    ]
