"""What an MCP server answered, as text for the student. Everything in it is data from a stranger."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rnow.types import ToolResult

if TYPE_CHECKING:
    from mcp_types import CallToolResult

_NAME_CHARACTERS = 200


def read_result(result: CallToolResult) -> ToolResult:
    """A ``CallToolResult`` as text: text parts joined by newlines, others named with their kind and size.

    Structured content stands in when there is no text. ``isError`` makes the result ``failed``.
    """
    parts = [_part(block) for block in result.content]
    has_text = any(text and is_text for text, is_text in parts)
    if not has_text and result.structured_content is not None:
        parts.append((json.dumps(result.structured_content, ensure_ascii=False, default=str), True))
    text = "\n".join(text for text, _ in parts)
    if not result.is_error:
        return ToolResult(content=text)
    if not text:
        text = "the tool failed and did not say why"
    said = text if text.lstrip().lower().startswith("error") else f"Error: {text}"
    return ToolResult(content=said, failed=True)


def _part(block: object) -> tuple[str, bool]:
    """A content block as text, and whether that is text of its own rather than a description."""
    from mcp_types import (
        AudioContent,
        EmbeddedResource,
        ImageContent,
        ResourceLink,
        TextContent,
        TextResourceContents,
    )

    match block:
        case TextContent():
            return block.text, True
        case ImageContent() | AudioContent():
            return f"[{_name(block.mime_type)}, {_size(_decoded(block.data))}]", False
        case EmbeddedResource(resource=TextResourceContents() as resource):
            return resource.text, True
        case EmbeddedResource(resource=resource):
            assert not isinstance(resource, TextResourceContents)
            mime = _name(resource.mime_type or "file")
            return f"[{mime}, {_size(_decoded(resource.blob))}: {_name(resource.uri)}]", False
        case ResourceLink():
            return f"[resource {_name(block.name)}: {_name(block.uri)}]", False
    return f"[{_name(getattr(block, 'type', None) or 'unknown content')}]", False


def _name(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _NAME_CHARACTERS else f"{text[:_NAME_CHARACTERS]}..."


def _decoded(base64: str) -> int:
    """Bytes that a base64 text stands for."""
    return max(0, len(base64) * 3 // 4 - base64[-2:].count("="))


def _size(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"
