"""A small real MCP server: ``python servers.py stdio`` or ``python servers.py http PORT`` (at ``/mcp``)."""

import asyncio
import os
import sys
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ImageContent, TextContent

server = MCPServer("test", log_level="CRITICAL")


@server.tool()
async def act(text: str, fail: bool = False, seconds: float = 0) -> str:
    """The tool of the conformance test."""
    await asyncio.sleep(seconds)
    if fail:
        raise ValueError("asked to")
    return text


@server.tool()
async def die() -> str:
    """Ends its server in the middle of the call."""
    os._exit(7)


@server.tool()
async def big(size: int) -> str:
    """Says a lot."""
    return "x" * size


@server.tool()
async def picture() -> list[Any]:
    """A text and an image."""
    return [
        TextContent(type="text", text="look:"),
        ImageContent(type="image", data="A" * 16_000, mime_type="image/png"),
    ]


@server.tool()
async def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
async def gone() -> str:
    """Is there at first."""
    return "here"


@server.tool()
async def change(ctx: Context) -> str:
    """Takes ``gone`` away, gives ``add`` another parameter, adds ``fresh``, and says so."""

    async def add(a: int, b: int, c: int) -> int:
        """Adds three numbers."""
        return a + b + c

    async def fresh() -> str:
        """New."""
        return "new"

    server.remove_tool("gone")
    server.remove_tool("add")
    server.add_tool(add)
    server.add_tool(fresh)
    await ctx.notify_tools_changed()
    return "changed"


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
