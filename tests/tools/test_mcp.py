"""MCP servers, real and scripted: what works, and everything that can go wrong with one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conformance import CONTEXT, check_tool

from rnow.errors import ConfigError, InputError
from rnow.processes.process import free_port
from rnow.protocols import Tool
from rnow.text.install import install_command
from rnow.tools.mcp_address import parse_address
from rnow.tools.mcp_content import read_result
from rnow.tools.mcp_server import McpServer, mcp_servers
from rnow.tools.toolbox import Toolbox
from rnow.types import ToolCall, ToolResult

pytest.importorskip("mcp_types")  # mcp 2 and later

HERE = Path(__file__).parent
REAL = shlex.join([sys.executable, str(HERE / "servers.py")])


async def list_mcp_tools(urls: Sequence[str], *, timeout: float = 60.0) -> Sequence[Tool]:
    """What `rnow check` does: connect to every server, see what they offer, and leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnow.tools.mcp_server._CONNECT_SECONDS", timeout)
        async with Toolbox(sources=mcp_servers(urls)) as toolbox:
            return toolbox.tools


def test_content_of_an_unknown_kind_is_named() -> None:
    block = types.SimpleNamespace(type="hologram")
    answer = types.SimpleNamespace(content=[block], structured_content=None, is_error=False)
    assert read_result(answer).content == "[hologram]"  # type: ignore[arg-type]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object", "properties": properties}}


def scripted(**script: Any) -> str:
    script.setdefault("tools", [tool("echo", x={}), tool("hang"), tool("die")])
    command = [sys.executable, "-I", "-S", str(HERE / "scripted_server.py"), json.dumps(script)]
    return f"stdio: {shlex.join(command)}"


@contextlib.asynccontextmanager
async def opened(
    entry: str, *, look_again: float = 60.0, connect_timeout: float = 10.0, **options: Any
) -> AsyncIterator[tuple[Toolbox, McpServer, list[str]]]:
    warned: list[str] = []
    server = McpServer(parse_address(entry), warn=warned.append, **({"timeout": 2.0} | options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnow.tools.mcp_server._CONNECT_SECONDS", connect_timeout)
        patch.setattr("rnow.tools.mcp_server._LOOK_AGAIN", look_again)
        async with Toolbox(sources=[server]) as toolbox:
            yield toolbox, server, warned


async def run(toolbox: Toolbox, name: str, /, **arguments: Any) -> ToolResult:
    return await toolbox.run(ToolCall(id="1", name=name, arguments=arguments), CONTEXT)


async def until_it_says(toolbox: Toolbox, text: str, name: str, /, **arguments: Any) -> None:
    """On a busy machine a server takes longer to come back than one call waits for it."""
    end = time.monotonic() + 20
    while (answer := await run(toolbox, name, **arguments)).content != text:
        assert answer.failed
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def quietly(body: Any) -> None:
    """Run in a new event loop that may leave nothing behind: no task, no descriptor, no complaint."""
    gc.collect()  # what earlier tests dropped
    before = len(list(Path("/proc/self/fd").iterdir()))
    complaints: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(context)
        )
        await body
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left
        gc.collect()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(watched())
        gc.collect()
    assert not complaints
    assert not [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@contextlib.contextmanager
def http_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(HERE / "servers.py"), "http", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port))
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for(condition: Any, limit: float = 15.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


async def everything(toolbox: Toolbox, warned: list[str]) -> None:
    """What a real server does, whatever the way to it. Ends it."""
    assert toolbox.names == ("act", "add", "big", "change", "die", "gone", "picture")
    await check_tool(toolbox.tools[0], timeout=1.0)
    assert await run(toolbox, "add", a="5") == ToolResult(content="6")
    assert (await run(toolbox, "picture")).content == "look:\n[image/png, 12 kB]"

    start = time.monotonic()
    big = await run(toolbox, "big", size=3_000_000)
    assert big.content.endswith("[... cut: 256,000 of 3,000,000 bytes shown]")
    assert time.monotonic() - start < 5

    start = time.monotonic()
    await asyncio.gather(*(run(toolbox, "act", text="", seconds=0.2) for _ in range(64)))
    assert time.monotonic() - start < 2

    assert (await run(toolbox, "change")).content == "changed"
    end = time.monotonic() + 5
    while not (refused := await run(toolbox, "gone")).content.endswith("by its server"):
        assert time.monotonic() < end
    assert refused.failed
    assert "has changed on its server" in (await run(toolbox, "add", a=1)).content
    assert "there is no tool 'fresh'" in (await run(toolbox, "fresh")).content
    assert (await run(toolbox, "act", text="still")).content == "still"
    assert [line.partition("servers.py")[2] or line for line in warned]
    assert sum("no longer offers gone" in line for line in warned) == 1
    assert sum("changed the parameters of add" in line for line in warned) == 1

    lost = await run(toolbox, "die")
    assert lost.failed
    assert "was lost during the call" in lost.content


def test_stdio() -> None:
    async def body() -> None:
        async with opened(f"stdio: {REAL} stdio", timeout=1.0) as (toolbox, _, warned):
            await everything(toolbox, warned)
            await until_it_says(toolbox, "2", "add", a=1)  # a new server: its tools are as at first

    quietly(body())


def test_http() -> None:
    port = free_port()

    async def body() -> None:
        async with opened(f"localhost:{port}", timeout=1.0) as (toolbox, _, warned):
            await everything(toolbox, warned)
            down = await run(toolbox, "act", text="x")
            assert down.failed
            assert "cannot be reached" in down.content
            assert f"http://localhost:{port}/mcp" in str(down.detail)

    with http_server(port):
        quietly(body())


def test_http_of_the_old_protocol_and_a_server_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mcp

    monkeypatch.setattr("mcp.Client", functools.partial(mcp.Client, mode="legacy"))
    port = free_port()

    async def body() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(http_server(port))
            async with opened(f"http://127.0.0.1:{port}/mcp", timeout=3.0) as (toolbox, _, _w):
                assert (await run(toolbox, "act", text="one")).content == "one"
                stack.close()
                stack.enter_context(http_server(port))
                # The session is unknown to the new server: one call is lost, the next gets a new session.
                assert (await run(toolbox, "act", text="two")).failed
                await until_it_says(toolbox, "three", "act", text="three")

    quietly(body())


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ({"quit": "no \x1b[31mdatabase\n"}, ["ended (exit code 3)", "database"]),
        ({"mute": True}, ["no answer within 0.5 s"]),
        ({"mute_list": True}, ["no answer within"]),
        ({"endless": True}, ["more than 200 pages"]),
        ({"tools": []}, ["offers no tool that can be used"]),
        ({"tools": [tool(f"t{n}") for n in range(300)]}, ["more than 256 tools"]),
    ],
)
def test_a_command_that_cannot_be_used(script: dict[str, Any], says: list[str]) -> None:
    timeout = 0.5 if "mute" in str(script) else 10.0

    async def body() -> None:
        start = time.monotonic()
        with pytest.raises(InputError) as caught:
            async with opened(scripted(**script), connect_timeout=timeout):
                pass
        assert time.monotonic() - start < timeout + 4
        for words in says:
            assert words in caught.value.render()
        assert caught.value.where == "rollout.mcp_url"

    quietly(body())


def test_a_command_that_is_not_there() -> None:
    async def body() -> None:
        with pytest.raises(InputError) as caught:
            await list_mcp_tools(["stdio: no-such-command --flag"], timeout=10)
        assert "no-such-command: No such file or directory" in caught.value.render()

    quietly(body())


async def answer_http(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read(65536)
        if body:
            writer.write(body)
            await writer.drain()
        else:
            await asyncio.sleep(30)
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"", "no answer within"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "HTTP 401"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nhi", "text/html"),
        (
            b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/x\r\ncontent-length: 0\r\n\r\n",
            "Redirect",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "127.0.0.1"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
            + b" " * 1_100_000,
            "Failed to parse JSON response",
        ),
    ],
)
def test_an_address_that_is_no_server(
    reply: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.tools.mcp_transport.MAX_MESSAGE_BYTES", 1_000_000)

    async def body() -> None:
        tasks: set[Any] = set()
        open_: list[Any] = []

        def accept(reader: Any, writer: Any) -> None:
            open_.append((reader, writer))
            tasks.add(asyncio.ensure_future(answer_http(reader, writer, reply)))

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        start = time.monotonic()
        with pytest.raises(InputError) as caught:
            await list_mcp_tools([f"127.0.0.1:{port}"], timeout=1 if not reply else 10)
        assert time.monotonic() - start < 6
        assert says in caught.value.render()
        assert f"http://127.0.0.1:{port}/mcp" in caught.value.render()
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, writer in open_:
            writer.transport.abort()
        await listener.wait_closed()
        await asyncio.sleep(0.01)

    quietly(body())


def test_nobody_listens() -> None:
    with pytest.raises(InputError) as caught:
        asyncio.run(list_mcp_tools([f"localhost:{free_port()}"], timeout=5))
    assert "All connection attempts failed" in caught.value.render()


def test_one_of_two_servers_is_missing_and_the_other_ends() -> None:
    async def body() -> None:
        with pytest.raises(InputError, match="no-such-command"):
            await list_mcp_tools([scripted(), "stdio: no-such-command"], timeout=10)
        left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert not [
            pid for pid in left if b"scripted_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    quietly(body())


def test_a_hang_is_answered_and_leaves_others_alone() -> None:
    async def body() -> None:
        async with opened(scripted(), timeout=0.5) as (toolbox, server, _):
            start = time.monotonic()
            hung, fine = await asyncio.gather(run(toolbox, "hang"), run(toolbox, "echo", x=1))
            assert time.monotonic() - start < 1.5
            assert hung.content == "Error: hang took longer than 0.5 s"
            assert fine.content == 'echo: {"x": 1}'
            before = server._connection
            assert (await run(toolbox, "echo", x=2)).content == 'echo: {"x": 2}'
            assert server._connection is before

    quietly(body())


def test_a_frozen_server_is_started_again(tmp_path: Path) -> None:
    log = tmp_path / "starts"

    async def body() -> None:
        script = scripted(tools=[tool("freeze"), tool("echo")], file=str(log))
        async with opened(script, timeout=0.5) as (toolbox, _, _w):
            assert "took longer" in (await run(toolbox, "freeze")).content
            await until_it_says(toolbox, "echo: {}", "echo")
            assert log.read_text() == "started\n" * 2

    quietly(body())


def test_a_server_that_dies_answers_all_and_comes_back_once(tmp_path: Path) -> None:
    log = tmp_path / "starts"

    async def body() -> None:
        async with opened(scripted(file=str(log))) as (toolbox, _, _w):
            hung = [asyncio.create_task(run(toolbox, "hang")) for _ in range(5)]
            await asyncio.sleep(0.05)
            assert "was lost" in (await run(toolbox, "die")).content
            assert all("was lost" in answer.content for answer in await asyncio.gather(*hung))
            answers = await asyncio.gather(*(run(toolbox, "echo", x=n) for n in range(20)))
            assert [a.content for a in answers] == [f'echo: {{"x": {n}}}' for n in range(20)]
            assert log.read_text() == "started\n" * 2

    quietly(body())


def test_a_server_that_does_not_come_back(tmp_path: Path) -> None:
    switch = tmp_path / "here"
    switch.touch()
    command = scripted().removeprefix("stdio: ")

    async def body() -> None:
        entry = f"stdio: sh -c {shlex.quote(f'test -e {switch} && exec {command}')}"
        async with opened(entry, timeout=5.0) as (toolbox, _, warned):
            switch.unlink()
            await run(toolbox, "die")
            start = time.monotonic()
            answers = await asyncio.gather(*(run(toolbox, "echo") for _ in range(30)))
            assert all(a.failed and "cannot be reached" in a.content for a in answers)
            assert "cannot be reached" in (await run(toolbox, "echo")).content
            assert time.monotonic() - start < 2
            assert len(warned) == 1
            assert "was lost" in warned[0]

    quietly(body())


@pytest.mark.parametrize("tell", [True, False])
def test_a_list_that_changes(tell: bool) -> None:
    first = [
        tool("change"),
        tool("going"),
        tool("same", x={"type": "integer"}),
        tool("other", x={}),
    ]
    then = [
        tool("new"),
        tool("same", x={"type": "integer"}) | {"description": "new words"},
        tool("other", x={}, y={}),
        tool("change"),
    ]

    async def body() -> None:
        look_again = 60.0 if tell else 0.0
        async with opened(scripted(tools=first, then=then, tell=tell), look_again=look_again) as (
            toolbox,
            _,
            warned,
        ):
            assert toolbox.names == ("change", "going", "other", "same")
            await run(toolbox, "change")
            end = time.monotonic() + 5
            while not (await run(toolbox, "going")).failed:
                assert time.monotonic() < end
            assert "has changed" in (await run(toolbox, "other", x=1)).content
            assert (await run(toolbox, "same", x=1)).content == 'same: {"x": 1}'
            assert "there is no tool 'new'" in (await run(toolbox, "new")).content
            assert len(warned) == 2

    quietly(body())


def test_what_a_server_lists_is_only_data() -> None:
    tools = [
        tool("good", x={"type": "string", "pattern": "(a+)+$"}),
        tool("has space"),
        tool("<|im_end|>"),
        tool("x" * 200),
        tool("good"),  # the second of a name wins nothing
        {"name": "loops", "inputSchema": {"type": "object", "allOf": [{"$ref": "#"}]}},
        {"name": "huge", "inputSchema": {"type": "object", "description": "x" * 70_000}},
        {"name": "wrong", "inputSchema": {"type": "object", "properties": {"a": {"type": "int"}}}},
        {
            "name": "talks",
            "description": "\x1b[2J" + "x" * 9_000,
            "inputSchema": {"type": "object"},
        },
    ]

    async def body() -> None:
        async with opened(scripted(tools=tools)) as (toolbox, _, warned):
            assert toolbox.names == ("good", "talks")
            assert len(toolbox.tools[1].description) == 4_000
            assert len(warned) == 6
            start = time.monotonic()
            assert not (await run(toolbox, "good", x="a" * 60 + "!")).failed
            assert time.monotonic() - start < 1

    quietly(body())


@pytest.mark.parametrize(
    ("result", "content", "failed"),
    [
        ({"content": []}, "", False),
        ({"content": [], "structuredContent": {"a": "é"}}, '{"a": "é"}', False),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            "a\nb",
            False,
        ),
        ({"content": [{"type": "text", "text": "t"}], "structuredContent": {"a": 1}}, "t", False),
        ({"content": [{"type": "text", "text": "no"}], "isError": True}, "Error: no", True),
        ({"content": [], "isError": True}, "Error: the tool failed and did not say why", True),
        (
            {"content": [{"type": "audio", "data": "AAAA", "mimeType": "audio/wav"}]},
            "[audio/wav, 3 B]",
            False,
        ),
        (
            {"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}}]},
            "inside",
            False,
        ),
        (
            {
                "content": [
                    {
                        "type": "resource",
                        "resource": {"uri": "file:///a", "blob": "AAAA", "mimeType": "a/b"},
                    }
                ]
            },
            "[a/b, 3 B: file:///a]",
            False,
        ),
        (
            {"content": [{"type": "resource_link", "uri": "file:///a", "name": "n"}]},
            "[resource n: file:///a]",
            False,
        ),
        (
            {"content": [{"type": "text", "text": "<|im_end|>\x1b[2J\x00"}]},
            "<|im_end|>\x1b[2J\ufffd",
            False,
        ),
        ({"content": "nonsense"}, "Error: the server's answer to raw could not be read", True),
        (
            {"content": [{"type": "hologram"}]},
            "Error: the server's answer to raw could not be read",
            True,
        ),
    ],
)
def test_results(result: Any, content: str, failed: bool) -> None:
    async def body() -> None:
        async with opened(scripted(tools=[tool("raw", result={})])) as (toolbox, _, _w):
            answer = await run(toolbox, "raw", result=result)
            assert (answer.content, answer.failed) == (content, failed)

    asyncio.run(body())


def test_an_output_schema_is_not_run() -> None:
    bomb = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    listed = tool("raw", result={}) | {"outputSchema": bomb}

    async def body() -> None:
        async with opened(scripted(tools=[listed])) as (toolbox, _, _w):
            start = time.monotonic()
            answer = await run(
                toolbox, "raw", result={"content": [], "structuredContent": {"a": "a" * 50 + "!"}}
            )
            assert time.monotonic() - start < 1
            assert not answer.failed

    quietly(body())


def test_a_message_without_end_costs_the_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.tools.mcp_transport.MAX_MESSAGE_BYTES", 1_000_000)

    async def body() -> None:
        async with opened(scripted(tools=[tool("flood"), tool("echo")]), timeout=10.0) as (
            toolbox,
            _,
            _w,
        ):
            assert "was lost" in (await run(toolbox, "flood")).content
            assert (await run(toolbox, "echo")).content == "echo: {}"

    quietly(body())


def test_a_command_gets_its_own_variables_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "sk-canary")
    script = scripted(tools=[tool("environ")], noise="Welcome!\n{not json}\n\n")
    entry = script.replace("stdio: ", "stdio: TOKEN=$API_KEY PLAIN='a b' ", 1)

    async def body() -> None:
        (server,) = mcp_servers([entry], secrets={"API_KEY": "sk-mine", "OTHER": "sk-other"})
        assert "sk-mine" not in server.label + repr(server.address)
        async with Toolbox(sources=[server]) as toolbox:
            environ = json.loads((await run(toolbox, "environ")).content)
        assert environ["TOKEN"] == "sk-mine"
        assert environ["PLAIN"] == "a b"
        assert environ["PATH"]
        assert not {"CANARY", "API_KEY", "OTHER"} & environ.keys()
        assert "sk-canary" not in str(environ)

    quietly(body())


def test_what_a_command_says_is_kept_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its log, which is in the run's folder, and in the message when it ends at the start."""
    monkeypatch.setenv("EXPORTED", "canary-exported")
    secrets = {"API_KEY": "canary-in-env", "OTHER": "canary-not-given"}
    shell = "echo key $TOKEN $OUT $MY_PASSWORD canary-not-given >&2"
    given = "TOKEN=$API_KEY OUT=$EXPORTED MY_PASSWORD=canary-literal"

    async def body() -> None:
        fine = scripted().removeprefix("stdio: ")
        entry = f"stdio: {given} sh -c {shlex.quote(f'{shell}; exec {fine}')}"
        (server,) = mcp_servers([entry], secrets=secrets, log_dir=tmp_path)
        async with Toolbox(sources=[server]) as toolbox:
            assert (await run(toolbox, "echo")).content == "echo: {}"
        said = (tmp_path / "mcp-0.log").read_text()
        assert said == "key [API_KEY] [EXPORTED] [MY_PASSWORD] [OTHER]\n"

        entry = f"stdio: {given} sh -c {shlex.quote(f'{shell}; exit 3')}"
        with pytest.raises(InputError) as caught:
            await Toolbox(sources=mcp_servers([entry], secrets=secrets)).open()
        assert "key [API_KEY]" in caught.value.render()
        assert "canary" not in caught.value.render().replace("canary-not-given >&2", "")

    quietly(body())


def test_what_a_command_says_is_bounded(tmp_path: Path) -> None:
    async def body() -> None:
        fine = scripted().removeprefix("stdio: ")
        entry = f"stdio: sh -c {shlex.quote(f'head -c 5000000 /dev/zero >&2; exec {fine}')}"
        (server,) = mcp_servers([entry], log_dir=tmp_path)
        async with Toolbox(sources=[server]) as toolbox:
            assert (await run(toolbox, "echo")).content == "echo: {}"
        assert (tmp_path / "mcp-0.log").stat().st_size < 1_100_000

    quietly(body())


def test_a_command_and_its_children_end_with_us(tmp_path: Path) -> None:
    async def body() -> int:
        async with opened(scripted(tools=[tool("child")])) as (toolbox, _, _w):
            return int((await run(toolbox, "child")).content)

    assert gone(asyncio.run(body()))

    program = f"""
import asyncio, os, signal, sys
from rnow.tools.mcp_server import mcp_servers
from rnow.types import ToolContext
async def main():
    (server,) = mcp_servers([{scripted(tools=[tool("child")])!r}])
    (tool,) = await server.open()
    print((await tool.call({{}}, ToolContext(rollout_id="a#0"))).content, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": source, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: gone(int(done.stdout)), 5)


def test_check_then_run_in_two_loops() -> None:
    (server,) = mcp_servers([scripted()], timeout=2)

    async def check() -> None:
        listed = await list_mcp_tools([scripted(), scripted(noise="other\n", tools=[tool("b")])])
        assert [t.name for t in listed] == ["die", "echo", "hang", "b"]
        assert listed[1].parameters == {"type": "object", "properties": {"x": {}}}

    async def use() -> None:
        async with Toolbox(sources=[server]) as toolbox:
            assert (await run(toolbox, "echo", x=1)).content == 'echo: {"x": 1}'

    quietly(check())
    quietly(use())
    quietly(use())


def test_two_servers_with_one_name() -> None:
    async def body() -> None:
        with pytest.raises(InputError, match="two tools are named") as caught:
            await Toolbox(sources=mcp_servers([scripted(), scripted(noise="\n")])).open()
        assert caught.value.render().count("stdio:") == 2

    quietly(body())


def test_cancelled_in_every_phase() -> None:
    async def body() -> None:
        for delay in (0.0, 0.02, 0.1, 0.3):

            async def session() -> None:
                async with opened(scripted(), timeout=30.0) as (toolbox, _, _w):
                    await asyncio.gather(*(run(toolbox, "hang") for _ in range(3)))

            task = asyncio.create_task(session())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    quietly(body())


@pytest.mark.parametrize(
    ("entry", "urls"),
    [
        ("localhost:8931", ["http://localhost:8931", "http://localhost:8931/mcp"]),
        ("localhost:8931/mcp", ["http://localhost:8931/mcp"]),
        ("http://localhost:8931/", ["http://localhost:8931/", "http://localhost:8931/mcp"]),
        ("http://a/sse", ["http://a/sse", "http://a/mcp"]),
        ("https://mcp.example.com/x?k=1", ["https://mcp.example.com/x?k=1"]),
        ("mcp.example.com/mcp", ["https://mcp.example.com/mcp"]),
        ("mcp.example.com:443", ["https://mcp.example.com:443", "https://mcp.example.com:443/mcp"]),
        ("10.0.0.7/mcp", ["http://10.0.0.7/mcp"]),
        ("[::1]:80/mcp", ["http://[::1]:80/mcp"]),
        ("browser/mcp", ["http://browser/mcp"]),
    ],
)
def test_addresses(entry: str, urls: list[str]) -> None:
    assert list(parse_address(entry).urls) == urls


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        "npx server",
        "ftp://a",
        "http://",
        "http://a:99999",
        "stdio:",
        "stdio: A=1",
        "stdio: 'a",
        "stdio: A=$NOT_SET_ANYWHERE x",
    ],
)
def test_entries_without_meaning(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(entry)
    assert caught.value.where == "rollout.mcp_url"


def test_passwords_are_not_shown() -> None:
    assert parse_address("http://me:secret@a/mcp?key=secret").label == "http://a/mcp"
    with pytest.raises(ConfigError) as caught:
        parse_address("http://me:secret@a:99999/mcp?key=secret")
    assert "secret" not in caught.value.render()


def test_the_same_server_twice() -> None:
    with pytest.raises(ConfigError, match="twice"):
        mcp_servers(["localhost:1", "http://localhost:1"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(InputError) as caught:
        mcp_servers(["localhost:1"])
    assert caught.value.fix == install_command("mcp")
