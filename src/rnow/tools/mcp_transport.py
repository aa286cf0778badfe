"""The two ways to an MCP server, bounded: a command under the leash, and streamable HTTP.

Both are transports of the official client: async context managers of a stream of incoming and one of outgoing messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.processes.process import ManagedProcess
from rnow.text.redact import Redactor
from rnow.tools.mcp_address import McpAddress, is_here
from rnow.tools.mcp_stderr import Stderr

if TYPE_CHECKING:
    import httpx2
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from mcp.client._transport import TransportStreams
    from mcp.shared.message import SessionMessage

    Incoming = MemoryObjectSendStream[SessionMessage | Exception]
    Outgoing = MemoryObjectReceiveStream[SessionMessage]

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""One message of a server. A longer one ends the connection (a command) or fails the call (HTTP)."""

# The last ones are the way out and its certificates: without them a server behind a proxy cannot start.
_INHERITED = """
    HOME LANG LC_ALL LC_CTYPE LOGNAME PATH SHELL TERM TMPDIR TZ USER
    HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR NODE_EXTRA_CA_CERTS
""".split()  # noqa: SIM905
_CLOSE_GRACE = 1.0
_KILL_GRACE = 2.0
_POLL = 0.02
_MAX_CONNECTIONS = 256


class CommandEnded(Exception):
    """A server's command ended. ``log`` holds the last lines of its stderr."""

    def __init__(self, message: str, log: list[str]) -> None:
        super().__init__(message)
        self.log = log


@contextlib.asynccontextmanager
async def open_command(
    address: McpAddress, *, log_dir: Path | None, number: int
) -> AsyncGenerator[TransportStreams, None]:
    """Start the command of ``address`` and speak with it through its stdin and stdout.

    It ends with this process, ``kill -9`` included. Its stderr goes to ``log_dir/mcp-<number>.log`` (None: nowhere), without
    secrets and 1 MB at most; its end is in the ``CommandEnded`` that is raised when the command ends before the context does.
    """
    import anyio
    from mcp.shared.message import SessionMessage

    with contextlib.ExitStack() as stack:
        log = None if log_dir is None else log_dir / f"mcp-{number}.log"
        stderr = Stderr(log, Redactor(address.hidden))
        stack.callback(stderr.wait, _CLOSE_GRACE)
        stack.callback(stderr.started)
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        with theirs:
            process = ManagedProcess(
                address.command,
                env={name: os.environ[name] for name in _INHERITED if name in os.environ}
                | dict(address.env),
                only_env=True,
                stdio=theirs.fileno(),
                log=stderr.path,
                name=address.label,
            )
            process.start()
        stderr.started()
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_MESSAGE_BYTES)
            received, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
            outgoing, to_send = anyio.create_memory_object_stream[SessionMessage](0)
            async with anyio.create_task_group() as tasks, received, incoming, outgoing, to_send:
                tasks.start_soon(_receive, reader, received)
                tasks.start_soon(_send, to_send, writer, received)
                yield incoming, outgoing
                tasks.cancel_scope.cancel()
        except Exception as error:
            if reader is not None and (reader.at_eof() or reader.exception()):
                with anyio.CancelScope(shield=True):
                    await _wait(process, _CLOSE_GRACE)  # its output ends a moment before it does
            if not process.alive():
                stderr.wait(_CLOSE_GRACE)
                raise CommandEnded(process.failure("ended").message, stderr.last_lines()) from error
            raise
        finally:
            with anyio.CancelScope(shield=True):
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_WR)  # end of input: a well-behaved server ends now
                await _stop(process)
            if writer is not None:
                writer.transport.abort()
                await asyncio.sleep(0)  # its socket is closed by the loop


async def _receive(reader: asyncio.StreamReader, received: Incoming) -> None:
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    async with received:
        while True:
            try:
                line = await reader.readline()
            except (ValueError, OSError):
                return  # a longer line, or it ended before it had read all that was sent to it
            if not line:
                return
            try:
                message = jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValueError:
                continue  # a server that prints to stdout: not meant for us
            try:
                await received.send(SessionMessage(message))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return


async def _send(to_send: Outgoing, writer: asyncio.StreamWriter, received: Incoming) -> None:
    async with to_send:
        try:
            async for item in to_send:
                line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                writer.write(line.encode() + b"\n")
                await writer.drain()
        except OSError:
            await received.aclose()  # the session sees the end instead of waiting for answers


async def _wait(process: ManagedProcess, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.alive() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL)


async def _stop(process: ManagedProcess) -> None:
    await _wait(process, _CLOSE_GRACE)
    await asyncio.to_thread(process.stop, _KILL_GRACE)


@contextlib.asynccontextmanager
async def open_http(
    url: str, *, read_timeout: float, on_status: Callable[[int], None]
) -> AsyncGenerator[TransportStreams, None]:
    """Speak streamable HTTP with a server.

    Args:
        read_timeout: seconds without a byte after which a request is given up; longer than any call may take.
        on_status: called with the status of every answer of 400 and above, which the client's errors do not name.
    """
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def look(response: httpx2.Response) -> None:
        if response.status_code >= 400:
            on_status(response.status_code)
        # We ask for plain bodies; one that is packed all the same may unpack to anything, and stays packed.
        response.headers.pop("content-encoding", None)
        if response.headers.get("content-type", "").lower().startswith("application/json"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = bounded(response.stream)

    def bounded(stream: httpx2.AsyncByteStream) -> httpx2.AsyncByteStream:
        class Bounded(httpx2.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                size = 0
                async for chunk in stream:
                    size += len(chunk)
                    if size > MAX_MESSAGE_BYTES:
                        # The kind of error that fails one call and not the connection.
                        raise httpx2.StreamError(f"more than {MAX_MESSAGE_BYTES:,} bytes")
                    yield chunk

            async def aclose(self) -> None:
                await stream.aclose()

        return Bounded()

    async with (
        httpx2.AsyncClient(
            headers={"accept-encoding": "identity"},
            timeout=httpx2.Timeout(30.0, read=read_timeout),
            limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
            trust_env=not is_here(url),
            event_hooks={"response": [look]},
        ) as client,
        streamable_http_client(
            url, http_client=client, max_sse_event_size=MAX_MESSAGE_BYTES
        ) as streams,
    ):
        yield streams
