"""Calling the functions of a file: arguments, results, concurrency, state."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.usercode.projects import call, calls, make_host, write

from rnow.usercode.host import CallOutcome, CodeHost, HostLimits

TOOLS = '''
import asyncio, collections, decimal, os, sys, threading, time

state = {"calls": 0}

@tool
def add(a: int, b: int = 2) -> int:
    """Add."""
    return a + b

@tool
def give(what: str) -> object:
    """Give something odd."""
    class Odd:
        def __str__(self): return "odd"
    circle = []
    circle.append(circle)
    return {
        "text": "t\\u00e9xt", "none": None, "bytes": b"\\x00\\xff", "dict": {"a": [1, "\\u00e9"]}, "tuple": (1, 2),
        "number": 1.5, "truth": True, "object": Odd(), "keys": {(1, 2): 3}, "circle": circle,
        "inner": {"at": decimal.Decimal("1.5")}, "surrogate": "a\\ud800b", "big": "\\u00e9" * 5_000_000,
        "coroutine": asyncio.sleep(0, "awaited"),
    }[what]

@tool
def context(word: str, args: ToolArgs) -> dict:
    """Look at the row."""
    return {"word": word, "metadata": args.metadata, "variables": args.variables}

@tool
def nap(seconds: float) -> int:
    """Sleep."""
    time.sleep(seconds)
    return os.getpid()

@tool
async def async_nap(seconds: float) -> int:
    """Sleep."""
    await asyncio.sleep(seconds)
    return os.getpid()

@tool
async def count() -> int:
    """Count the calls of this process."""
    state["calls"] += 1
    return state["calls"]

@tool
def where() -> dict:
    """Where it runs."""
    found = {"cwd": os.getcwd(), "main": threading.current_thread() is threading.main_thread(), "argv": sys.argv,
             "stdin": sys.stdin.read(), "name": __name__, "children": os.getpid() == os.getsid(0)}
    os.chdir("/")
    return found

@tool
def length(text: str) -> int:
    """Count characters."""
    return len(text)
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeHost]:
    with make_host(tmp_path_factory.mktemp("project"), TOOLS) as host:
        yield host


def test_what_it_offers(host: CodeHost) -> None:
    by_name = {info.name: info for info in host.functions}
    assert list(by_name)[:3] == ["add", "give", "context"]
    add = by_name["add"]
    assert (add.kind, add.place, add.description) == ("tools", "tools.py:7", "Add.")
    assert add.parameters == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
        "required": ["a"],
    }
    assert by_name["async_nap"].is_async
    assert by_name["context"].parameters["properties"] == {"word": {"type": "string"}}


def test_arguments_and_defaults(host: CodeHost) -> None:
    assert call(host, "add", a=1).value == "3"
    outcome = call(host, "add", a=1, b=40)
    assert outcome == CallOutcome(status="ok", value="41")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("text", "téxt"),
        ("none", ""),
        ("bytes", "\x00�"),
        ("dict", '{"a": [1, "é"]}'),
        ("tuple", "[1, 2]"),
        ("number", "1.5"),
        ("truth", "True"),
        ("object", "odd"),
        ("keys", "{(1, 2): 3}"),
        ("circle", "[[...]]"),
        ("inner", '{"at": "1.5"}'),
        ("surrogate", "a?b"),
        ("coroutine", "awaited"),
    ],
)
def test_any_result_becomes_text(host: CodeHost, what: str, text: str) -> None:
    outcome = call(host, "give", what=what)
    assert (outcome.status, outcome.value, outcome.omitted) == ("ok", text, 0)


def test_a_large_result_is_cut_before_it_is_sent(host: CodeHost) -> None:
    outcome = call(host, "give", what="big")
    assert outcome.value == "é" * (128 * 1024)
    assert outcome.omitted == 10_000_000 - 256 * 1024


def test_the_row_is_injected(host: CodeHost) -> None:
    payload = {"arguments": {"word": "x"}, "metadata": {"a": [1]}, "variables": {"n": 2}}
    outcome = asyncio.run(host.call("context", payload, timeout=10))
    assert json.loads(outcome.value) == {"word": "x", "metadata": {"a": [1]}, "variables": {"n": 2}}


def test_large_arguments(host: CodeHost) -> None:
    texts = ["x" * length for length in (30_000, 33_000, 400_000, 3_000_000)] * 10
    outcomes = calls(host, *(("length", {"text": text}, 20.0) for text in texts))
    assert [outcome.value for outcome in outcomes] == [str(len(text)) for text in texts]


def test_arguments_that_cannot_be_sent(host: CodeHost) -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    outcome = call(host, "length", text=circle)
    assert outcome.status == "invalid"
    assert "Circular" in (outcome.error or "")


def test_an_unknown_name_is_our_mistake(host: CodeHost) -> None:
    with pytest.raises(KeyError):
        call(host, "subtract")


def test_where_the_code_runs(host: CodeHost) -> None:
    for _ in range(2):  # it changes the folder: the next call must not notice
        found = json.loads(call(host, "where").value)
        assert found == {
            "cwd": str(host.file.parent),
            "main": True,
            "argv": [str(host.file)],
            "stdin": "",
            "name": "tools",
            "children": True,
        }


def test_sync_calls_run_side_by_side(host: CodeHost) -> None:
    started = time.monotonic()
    outcomes = calls(host, *[("nap", {"seconds": 0.5}, 20.0)] * 16)
    assert time.monotonic() - started < 4  # one after another: 8
    assert len({outcome.value for outcome in outcomes}) > 8
    assert str(os.getpid()) not in {outcome.value for outcome in outcomes}


def test_async_calls_share_one_process(host: CodeHost) -> None:
    started = time.monotonic()
    outcomes = calls(host, *[("async_nap", {"seconds": 0.5}, 20.0)] * 64)
    assert time.monotonic() - started < 4
    assert len({outcome.value for outcome in outcomes}) == 1
    first = int(call(host, "count").value)
    assert int(call(host, "count").value) == first + 1


def test_short_calls_behind_a_slow_one_are_not_held_up(host: CodeHost) -> None:
    async def mixed() -> float:
        await asyncio.gather(*(one(0) for _ in range(100)))
        started = time.monotonic()
        slow = asyncio.create_task(one(3))
        await asyncio.gather(*(one(0) for _ in range(100)))
        took = time.monotonic() - started
        await slow
        return took

    async def one(seconds: float) -> CallOutcome:
        return await host.call("nap", {"arguments": {"seconds": seconds}}, timeout=20)

    assert asyncio.run(mixed()) < 2


def test_hundreds_of_short_calls_are_cheap(host: CodeHost) -> None:
    def one_round() -> float:
        started = time.monotonic()
        outcomes = calls(host, *[("add", {"a": 1}, 20.0)] * 128)
        assert {outcome.value for outcome in outcomes} == {"3"}
        return time.monotonic() - started

    assert min(one_round() for _ in range(8)) < 0.1


def test_no_more_workers_than_allowed(tmp_path: Path) -> None:
    with make_host(tmp_path, TOOLS, limits=HostLimits(workers=2)) as host:
        outcomes = calls(host, *[("nap", {"seconds": 0.1}, 20.0)] * 10)
        assert len({outcome.value for outcome in outcomes}) <= 2
        assert all(outcome.status == "ok" for outcome in outcomes)


def test_waiting_for_a_worker_does_not_count(tmp_path: Path) -> None:
    with make_host(tmp_path, TOOLS, limits=HostLimits(workers=1)) as host:
        outcomes = calls(host, *[("nap", {"seconds": 0.3}, 1.0)] * 6)
        assert [outcome.status for outcome in outcomes] == ["ok"] * 6


def test_helpers_of_the_folder_and_state_of_the_module(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 7\n", "helper.py")
    write(tmp_path, "VALUE = 8\n", "lazy.py")
    code = """
    import multiprocessing
    import helper

    def double(n):
        return 2 * n

    @tool
    def f() -> list:
        '''Use both.'''
        import lazy
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return [helper.VALUE, lazy.VALUE, pool.map(double, [4])]
    """
    with make_host(tmp_path, code) as host:
        assert call(host, "f").value == "[7, 8, [8]]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helper.py", "lazy.py", "tools.py"]


@pytest.mark.parametrize(
    "at_import",
    [
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
        "import socket\nkept = socket.socket()\n",
    ],
    ids=["thread", "socket"],
)
def test_what_must_not_be_copied_is_imported_by_each_worker(tmp_path: Path, at_import: str) -> None:
    code = (
        at_import
        + """
import os, time
MINE = os.getpid()

@tool
def f(seconds: float) -> bool:
    '''Whether this process imported the file itself.'''
    time.sleep(seconds)
    return MINE == os.getpid()

@tool
async def g() -> bool:
    '''The same.'''
    return MINE == os.getpid()
"""
    )
    with make_host(tmp_path, code) as host:
        outcomes = calls(host, *[("f", {"seconds": 0.2}, 20.0)] * 3, ("g", {}, 20.0))
        assert [outcome.value for outcome in outcomes] == ["True"] * 4


def test_otherwise_the_import_is_shared_and_random_numbers_are_not(tmp_path: Path) -> None:
    code = """
    import os, random, time
    MINE = os.getpid()

    @tool
    def f() -> list:
        '''Whether this process imported the file itself, and a number.'''
        time.sleep(0.2)
        return [MINE == os.getpid(), random.random()]
    """
    with make_host(tmp_path, code) as host:
        found = [json.loads(outcome.value) for outcome in calls(host, *[("f", {}, 20.0)] * 4)]
        assert not any(own for own, _ in found)
        assert len({number for _, number in found}) == 4


def test_several_event_loops_one_after_another(host: CodeHost) -> None:
    assert [call(host, "add", a=n).value for n in range(3)] == ["2", "3", "4"]

    async def ended_early() -> None:
        asyncio.create_task(host.call("nap", {"arguments": {"seconds": 30}}, timeout=60))  # noqa: RUF006
        await asyncio.sleep(0.1)

    asyncio.run(ended_early())
    assert call(host, "add", a=3).value == "5"


def test_many_first_calls_share_one_start(tmp_path: Path) -> None:
    host = make_host(tmp_path, TOOLS)
    outcomes = calls(host, *[("add", {"a": 1}, 20.0)] * 20, *[("count", {}, 20.0)] * 20)
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert {outcome.value for outcome in outcomes[20:]} == {str(n) for n in range(1, 21)}
    host.close()


def test_a_closed_host_starts_again(tmp_path: Path) -> None:
    host = make_host(tmp_path, TOOLS)
    assert host.pids() == set()
    assert call(host, "add", a=1).value == "3"
    host.close()
    assert host.pids() == set()
    host.close()
    assert call(host, "add", a=1).value == "3"
    host.close()


def test_closed_in_the_middle_of_a_message(tmp_path: Path) -> None:
    """What was not sent of a large call is not the first thing that the next supervisor hears."""

    async def body(host: CodeHost) -> CallOutcome:
        payload = {"arguments": {}, "metadata": {"large": "x" * 10_000_000}}
        large = asyncio.ensure_future(host.call("nap", payload, timeout=20))
        for _ in range(3):
            await asyncio.sleep(0)
        host.close()
        await asyncio.wait({large})
        assert large.cancelled()
        async with asyncio.timeout(10):
            return await host.call("nap", {"arguments": {}}, timeout=20)

    code = '@tool\ndef nap() -> str:\n    """Do nothing."""\n    return "awake"\n'
    with make_host(tmp_path, code) as host:
        assert asyncio.run(body(host)).value == "awake"
