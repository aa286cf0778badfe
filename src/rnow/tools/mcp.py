"""MCP servers as sources of tools: the entries of ``rollout.mcp_url``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rnow.errors import ConfigError
from rnow.tools.mcp_address import parse_address
from rnow.tools.mcp_connection import require_client
from rnow.tools.mcp_server import McpServer

__all__ = ["McpServer", "mcp_servers"]


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
