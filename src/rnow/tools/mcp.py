"""MCP servers as sources of tools: the entries of ``rollout.mcp_url``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rnow.errors import ConfigError
from rnow.tools.mcp_address import parse_address
from rnow.tools.mcp_connection import require_client
from rnow.tools.mcp_server import ListedTool, McpServer, McpTool

__all__ = ["ListedTool", "McpServer", "McpTool", "list_mcp_tools", "mcp_servers"]


def mcp_servers(
    urls: Sequence[str],
    *,
    timeout: float = 60.0,
    connect_timeout: float = 60.0,
    secrets: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[McpServer]:
    """The servers of ``rollout.mcp_url``, not connected yet. See ``rnow.tools.mcp_address.parse_address`` for an entry.

    Args:
        timeout: seconds for one call (``rollout.tool_timeout``).
        connect_timeout: seconds for each server to come up.
        secrets: the project's .env, for ``stdio: NAME=$SECRET command``.
        log_dir: for the stderr of commands, without secrets; None keeps none.
        warn: told once about each thing that does not stop the run.

    Raises:
        InputError: the client is not installed.
        ConfigError: an entry has no meaning, or stands there twice.
    """
    if not urls:
        return []
    require_client()
    servers: list[McpServer] = []
    for number, url in enumerate(urls):
        address = parse_address(url, secrets)
        if any(address == other.address for other in servers):
            raise ConfigError(
                f"{address.label} stands there twice", where="rollout.mcp_url", fix="remove one"
            )
        servers.append(
            McpServer(
                address,
                timeout=timeout,
                connect_timeout=connect_timeout,
                log_dir=log_dir,
                number=number,
                warn=warn,
            )
        )
    return servers


async def list_mcp_tools(
    urls: Sequence[str],
    *,
    timeout: float = 60.0,
    secrets: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[ListedTool]:
    """Connect to every server, all at once, say what they offer, and leave. ``timeout`` is for each to come up.

    Raises:
        InputError: as ``mcp_servers``; a server is not there, hangs, or offers nothing.
    """
    servers = mcp_servers(
        urls, connect_timeout=timeout, secrets=secrets, log_dir=log_dir, warn=warn
    )
    try:
        for result in await asyncio.gather(
            *(server.open() for server in servers), return_exceptions=True
        ):
            if isinstance(result, BaseException):
                raise result
        return [tool for server in servers for tool in server.listed()]
    finally:
        await asyncio.gather(*(server.close() for server in servers), return_exceptions=True)
