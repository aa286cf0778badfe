"""What every Tool does, whatever stands behind it.

The tool under test is ``act(text, fail=False, seconds=0)``: it waits, then gives ``text`` back, or fails.
"""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest

from rnow.protocols import Tool
from rnow.tools.arguments import ArgumentChecker
from rnow.types import ToolContext, ToolResult

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "fail": {"type": "boolean"},
        "seconds": {"type": "number"},
    },
    "required": ["text"],
}

CONTEXT = ToolContext(rollout_id="dataset_0/3#1", metadata={"answer": "é"}, variables={"n": 1})


async def check_tool(tool: Tool, *, timeout: float) -> None:
    """``timeout``: the tool's own limit in seconds, which a call of twice as long is meant to meet."""
    check_description(tool)
    await check_says(tool, "hä\n\x1b[31m")

    failure = await tool.call({"text": "x", "fail": True}, CONTEXT)
    assert failure.failed
    assert failure.content.lower().startswith("error")

    start = time.monotonic()
    late = await tool.call({"text": "x", "seconds": 2 * timeout}, CONTEXT)
    assert late.failed
    assert f"took longer than {timeout:g} s" in late.content
    assert time.monotonic() - start < timeout + 1

    start = time.monotonic()
    calls = [tool.call({"text": str(n), "seconds": 0.2}, CONTEXT) for n in range(16)]
    answers = await asyncio.gather(*calls)
    assert [answer.content for answer in answers] == [str(n) for n in range(16)]
    assert time.monotonic() - start < 16 * 0.2 / 2

    task = asyncio.create_task(tool.call({"text": "x", "seconds": timeout / 2}, CONTEXT))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_says(tool, "again")


def check_description(tool: Tool) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", tool.name)
    assert tool.description
    assert json.loads(json.dumps(tool.parameters)) == tool.parameters
    assert list(tool.parameters["properties"]) == ["text", "fail", "seconds"]
    checked = ArgumentChecker(tool.parameters).check({"text": "a", "seconds": "0.5"})
    assert checked == {"text": "a", "seconds": 0.5}


async def check_says(tool: Tool, text: str) -> None:
    answer = await tool.call({"text": text}, CONTEXT)
    assert isinstance(answer, ToolResult)
    assert (answer.content, answer.failed, answer.detail) == (text, False, None)
