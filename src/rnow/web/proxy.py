"""The one door a browser has to the network: a forward proxy on loopback that dials only what the guard lets through.

The browser sends names. The proxy resolves each once, checks the addresses, and dials one of those it has checked, so
redirects, sub-resources, sockets and names that change their address all meet the same check. ``https`` passes as an
opaque tunnel (``CONNECT``); nothing is intercepted.

There is no password: what the proxy reaches, every program of this machine reaches without it. Requests that are not
addressed to a proxy are refused, so a page in another browser cannot use it as a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rnow.web.addresses import Guard, Refused, parse_host, split_port

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[str, int], Awaitable[Stream]]

_MAX_HEAD = 64 * 1024
_CHUNK = 64 * 1024
_REMEMBERED = 512
_REQUEST = re.compile(rb"([A-Z]{1,20}) ([!-~]{1,16384}) HTTP/1\.[01]")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[^\r\n\0]*")
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te upgrade".split()
)
_REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    504: "Gateway Timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one connection, in bytes and seconds, and how many there may be at once."""

    received: int = 32 * 1024 * 1024
    sent: int = 8 * 1024 * 1024
    total_seconds: float = 120.0
    idle_seconds: float = 30.0
    head_seconds: float = 30.0
    connect_seconds: float = 10.0
    connections: int = 256


class _Answer(Exception):
    """End the request with a status of our own."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _OverLimit(Exception):
    pass


async def _dial(address: str, port: int) -> Stream:
    return await asyncio.open_connection(address, port, limit=_MAX_HEAD)


class PinningProxy:
    """Start it with ``start``, give ``url`` to the browser, end it with ``close``; one event loop throughout.

    Args:
        guard: decides about every host and port.
        limits: bounds of one connection.
        dial: opens a connection to an address that passed.
    """

    def __init__(self, guard: Guard, *, limits: Limits | None = None, dial: Dial = _dial) -> None:
        self._guard = guard
        self._limits = limits or Limits()
        self._dial = dial
        self._server: asyncio.Server | None = None
        self._live: set[asyncio.Task[None]] = set()
        self._failures: dict[tuple[str, int], str] = {}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def failure(self, host: str, port: int) -> str | None:
        """Why the last request to this canonical host and port did not get through; None when it did."""
        return self._failures.get((host, port))

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_MAX_HEAD)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._live):
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        try:
            async with asyncio.timeout(self._limits.total_seconds):
                await self._serve(reader, writer)
        except _Answer as answer:
            with contextlib.suppress(OSError, TimeoutError):
                await _send_answer(writer, answer)
        except (
            OSError,  # TimeoutError is one
            EOFError,
            asyncio.LimitOverrunError,
            _OverLimit,
            asyncio.CancelledError,
        ):
            _reset(writer)
        finally:
            self._live.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._live) > self._limits.connections:
            raise _OverLimit
        try:
            async with asyncio.timeout(self._limits.head_seconds):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Answer(431, "the request's headers are too long") from None
        line, _, rest = head[:-4].partition(b"\r\n")
        request = _REQUEST.fullmatch(line)
        headers = _split_headers(rest)
        if request is None or headers is None:
            raise _Answer(400, "not a request to a proxy")
        method, target = (part.decode("ascii") for part in request.groups())
        if method == "CONNECT":
            upstream = await self._open(target, None)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._relay((reader, writer), upstream)
            return
        found = re.match(r"http://([^/?#]+)([^#]*)", target)
        if found is None:
            raise _Answer(400, "not a request to a proxy")
        authority, path = found.groups()
        upstream = await self._open(authority, 80)
        try:
            upstream[1].write(
                f"{method} {path if path.startswith('/') else '/' + path} HTTP/1.1\r\n"
                f"Host: {authority}\r\nConnection: close\r\n".encode("ascii")
                + b"".join(header + b"\r\n" for header in headers if _name(header) != b"host")
                + b"\r\n"
            )
            await self._relay((reader, writer), upstream, answer_head=True)
        finally:
            upstream[1].close()

    async def _open(self, authority: str, default_port: int | None) -> Stream:
        try:
            host_text, port = split_port(authority, default_port)
            host = parse_host(host_text)
        except Refused as error:
            raise _Answer(403, str(error)) from None
        try:
            addresses = await self._guard.addresses(host, port)
            opened = await self._dial_first(addresses, port)
        except Refused as error:
            raise self._failed(host, port, 403, str(error)) from None
        except TimeoutError:
            raise self._failed(host, port, 504, "it did not answer in time") from None
        except (OSError, UnicodeError):
            raise self._failed(host, port, 502, "it cannot be reached") from None
        self._failures.pop((host, port), None)
        return opened

    def _failed(self, host: str, port: int, status: int, reason: str) -> _Answer:
        self._failures.pop((host, port), None)
        self._failures[(host, port)] = reason
        if len(self._failures) > _REMEMBERED:
            del self._failures[next(iter(self._failures))]  # the oldest
        return _Answer(status, reason)

    async def _dial_first(self, addresses: list[str], port: int) -> Stream:
        last: OSError = OSError("no address")
        for address in addresses:
            try:
                async with asyncio.timeout(self._limits.connect_seconds):
                    return await self._dial(address, port)
            except OSError as error:  # TimeoutError is one
                last = error
        raise last

    async def _relay(self, client: Stream, upstream: Stream, *, answer_head: bool = False) -> None:
        """Pass bytes both ways until one side has ended; a browser that hangs up wants nothing more."""
        active = [asyncio.get_running_loop().time()]

        async def down() -> None:
            if answer_head:
                client[1].write(await self._read_answer(upstream[0]))
            await self._copy(upstream[0], client[1], self._limits.received, active)

        tasks = [
            asyncio.ensure_future(down()),
            asyncio.ensure_future(self._copy(client[0], upstream[1], self._limits.sent, active)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            upstream[1].close()

    async def _copy(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limit: int,
        active: list[float],
    ) -> None:
        """``active`` is when either direction last moved: one of them may rest while the other is busy."""
        clock = asyncio.get_running_loop().time
        passed = 0
        while True:
            try:
                async with asyncio.timeout_at(active[0] + self._limits.idle_seconds):
                    data = await reader.read(_CHUNK)
            except TimeoutError:
                if clock() < active[0] + self._limits.idle_seconds:
                    continue
                raise
            if not data:
                return
            active[0] = clock()
            passed += len(data)
            if passed > limit:
                raise _OverLimit
            writer.write(data)
            await writer.drain()

    async def _read_answer(self, reader: asyncio.StreamReader) -> bytes:
        """The head of the final answer, with the connection's own headers replaced: one request, one connection, so that
        nothing meant for another host is ever sent to this one."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            line, _, rest = head[:-4].partition(b"\r\n")
            status = _STATUS.fullmatch(line)
            headers = _split_headers(rest)
            if status is None or headers is None:
                raise EOFError
            code = int(status.group(1))
            if code == 101:
                raise EOFError
            if code >= 200:
                return b"\r\n".join([line, *headers, b"Connection: close", b"", b""])


def _split_headers(block: bytes) -> list[bytes] | None:
    """The header lines but for those about the connection itself; None when one is malformed."""
    lines = [line for line in block.split(b"\r\n") if line]
    if not all(_HEADER.fullmatch(line) for line in lines):
        return None
    return [line for line in lines if _name(line) not in _HOP_BY_HOP]


def _name(header: bytes) -> bytes:
    return header.partition(b":")[0].lower()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection off; after a quiet end the browser would take the part that arrived for the whole."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def _send_answer(writer: asyncio.StreamWriter, answer: _Answer) -> None:
    body = f"<!doctype html><p>Not visited: {html.escape(answer.reason)}.\n".encode()
    writer.write(
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\n"
        f"Content-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n".encode("ascii")
        + body
    )
    async with asyncio.timeout(5):
        await writer.drain()
