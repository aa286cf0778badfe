"""The functions of a real tools.py as tools."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conformance import CONTEXT, check_tool

from rnow.errors import InputError
from rnow.tools.host_tools import HostTools
from rnow.tools.toolbox import Toolbox
from rnow.types import ToolCall, ToolContext, ToolResult
from rnow.usercode.host import CallOutcome, CodeHost

CODE = '''
import asyncio, time
from rnow.core import tool, ToolArgs

@tool
def act(text: str, fail: bool = False, seconds: float = 0) -> str:
    """The tool of the conformance test."""
    time.sleep(seconds)
    if fail:
        raise ValueError("asked to")
    return text

@tool(timeout=0.5)
async def wait() -> str:
    """Too slow for its own limit."""
    await asyncio.sleep(30)

@tool
def look(args: ToolArgs, n: int = 0) -> str:
    """What a row brings along."""
    return f"{args.metadata['answer']} {args.variables['n']} {n}"

@tool
def needs() -> str:
    """Imports what is not there."""
    import yaml_that_is_not_there

@tool
def big() -> str:
    """Says a lot."""
    return "x" * 10_000_000
'''


@pytest.fixture
def host(tmp_path: Path) -> CodeHost:
    file = tmp_path / "tools.py"
    file.write_text(CODE)
    return CodeHost(file, "tools")


async def run(toolbox: Toolbox, name: str, /, **arguments: object) -> ToolResult:
    return await toolbox.run(ToolCall(id="1", name=name, arguments=arguments), CONTEXT)


def test_functions_are_tools(host: CodeHost) -> None:
    async def body() -> None:
        async with Toolbox(sources=[HostTools(host, 1.0)]) as toolbox:
            await check_tool(toolbox.tools[0], timeout=1.0)

    asyncio.run(body())
    assert not host.pids()


def test_limits_rows_and_two_loops(host: CodeHost) -> None:
    async def body() -> None:
        async with Toolbox(sources=[HostTools(host, 30.0)]) as toolbox:
            assert toolbox.names == ("act", "wait", "look", "needs", "big")
            slow = await run(toolbox, "wait")
            assert slow.content == "Error: took longer than 0.5 s"
            assert (await run(toolbox, "look", n="7")).content == "é 1 7"
            assert "there is no parameter args" in (await run(toolbox, "look", args={})).content
            big = await run(toolbox, "big")
            assert big.content.endswith("x\n[... cut: 256,000 of 10,000,000 bytes shown]")
            failed = await run(toolbox, "act", text="a", fail=True)
            assert failed.content == "Error: ValueError: asked to"
            assert "Traceback" in str(failed.detail)

    asyncio.run(body())
    asyncio.run(body())
    assert not host.pids()


def test_what_wants_a_sandbox_runs_there_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text(CODE.replace("@tool(timeout=0.5)", "@tool(timeout=0.5, sandbox=True)"))
    asked: list[tuple[str, float]] = []

    class Inside:
        async def call(self, name: str, payload: object, *, timeout: float) -> CallOutcome:
            asked.append((name, timeout))
            return CallOutcome(status="ok", value="from inside")

    class Fakes:
        async def host(self, host: CodeHost, context: ToolContext) -> Inside:
            assert context == CONTEXT
            return Inside()

    async def body(sandboxes: Any) -> ToolResult:
        source = HostTools(CodeHost(file, "tools"), 5.0, sandboxes=sandboxes)
        async with Toolbox(sources=[source]) as toolbox:
            assert "wait" in toolbox.names
            assert (await run(toolbox, "act", text="outside")).content == "outside"
            return await run(toolbox, "wait")

    assert asyncio.run(body(Fakes())).content == "from inside"
    assert asked == [("wait", 0.5)]
    refused = asyncio.run(body(None))
    assert refused.failed
    assert "no sandbox" in refused.content


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text("import nothing_like_this\n")

    async def body() -> None:
        with pytest.raises(InputError, match="nothing_like_this"):
            await Toolbox(sources=[HostTools(CodeHost(file, "tools"), 5.0)]).open()

    asyncio.run(body())


def test_what_to_install_is_for_the_transcript_and_not_for_the_student(host: CodeHost) -> None:
    async def body() -> None:
        async with Toolbox(sources=[HostTools(host, 5.0)]) as toolbox:
            result = await run(toolbox, "needs")
        assert result.failed
        assert result.content == (
            "Error: ModuleNotFoundError: No module named 'yaml_that_is_not_there'"
        )
        assert result.detail is not None
        assert "Traceback" in result.detail
        fix = f"fix: {sys.executable} -m pip install yaml_that_is_not_there"
        assert result.detail.endswith(fix)

    asyncio.run(body())
