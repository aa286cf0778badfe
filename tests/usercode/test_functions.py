"""Reading a file's functions without running it here, and its faults with file and line."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.usercode.projects import HEAD, make_host, wait_until, write

from rnow.errors import InputError
from rnow.processes.process import StartFailed
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CodeHost, HostLimits, load_functions


def refused(folder: Path, code: str, **options: object) -> InputError:
    path = write(folder, code)
    with pytest.raises(InputError) as caught:
        CodeHost(path, "tools", **options).start()  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.title == "Invalid tools"
    return caught.value


def test_tools_and_rewards_by_kind(tmp_path: Path) -> None:
    code = """
    @tool(timeout=2, sandbox=True)
    async def search(query: str) -> str:
        '''Search.'''
        return ""

    @reward(precondition=True)
    def good(args: RewardArgs, messages: list) -> float:
        '''Judge.'''
        return 1.0
    """
    path = write(tmp_path, code)
    assert load_functions(path, "tools") == [
        FunctionInfo(
            kind="tools",
            name="search",
            file=path,
            place="tools.py:3",
            description="Search.",
            parameters={
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
            },
            is_async=True,
            timeout=2.0,
            sandbox=True,
        )
    ]
    (good,) = load_functions(path, "rewards")
    assert (good.name, good.precondition, good.place) == ("good", True, "tools.py:8")
    assert "rnow_probe" not in sys.modules


def test_nothing_runs_here_and_nothing_is_left(tmp_path: Path) -> None:
    code = f"import os\nassert os.getpid() != {os.getpid()}\n@tool\ndef f() -> str:\n    'Do it.'\n"
    before = set(sys.modules)
    assert [info.name for info in load_functions(write(tmp_path, code), "tools")] == ["f"]
    assert "tools" not in set(sys.modules) - before
    assert [path.name for path in tmp_path.iterdir()] == ["tools.py"]


def test_an_empty_file_has_none(tmp_path: Path) -> None:
    assert load_functions(write(tmp_path, ""), "tools") == []


def test_hints_as_text(tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    path.write_text(
        "from __future__ import annotations\n"
        + HEAD
        + "from typing import Literal\n\n@tool\ndef f(a: list[Literal['x']], b: int | None = None) -> str:\n    'Do it.'\n"
    )
    (info,) = load_functions(path, "tools")
    assert info.parameters["properties"] == {
        "a": {"type": "array", "items": {"type": "string", "enum": ["x"]}},
        "b": {"type": ["integer", "null"]},
    }


@pytest.mark.parametrize(
    ("code", "message", "where", "why"),
    [
        ("def f(:\n", "tools.py is not valid Python", "tools.py:2", "SyntaxError"),
        (
            "import no_such_package_anywhere\n",
            'tools.py imports "no_such_package_anywhere", which is not installed',
            "tools.py:2",
            "ModuleNotFoundError",
        ),
        ("1 / 0\n", "tools.py cannot be imported", "tools.py:2", "ZeroDivisionError"),
        ("import sys; sys.exit(3)\n", "ends the program", "tools.py:2", "SystemExit: 3"),
        ("raise KeyboardInterrupt\n", "cannot be imported", "tools.py:2", "KeyboardInterrupt"),
        ("import os; os._exit(3)\n", "ends the program", "tools.py", "exit code 3"),
        ("import os; os.abort()\n", "ends the program", "tools.py", "signal 6"),
        ("raise ValueError('\\x1b[2Jgone')\n", "cannot", "tools.py:2", "\\x1b[2Jgone"),
        ("@tool(timeout=-1)\ndef f(): ...\n", "cannot be imported", "tools.py:2", "positive number"),
        ("x = bytearray(1 << 34)\n", "cannot be imported", "tools.py:2", "MemoryError"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(
    tmp_path: Path, code: str, message: str, where: str, why: str
) -> None:
    error = refused(tmp_path, code)
    assert message in error.message
    assert error.where == where
    assert why in (error.why or "")
    assert error.fix


def test_an_import_that_hangs_is_given_up(tmp_path: Path) -> None:
    started = time.monotonic()
    error = refused(tmp_path, "import time\ntime.sleep(100)\n", import_timeout=0.5)
    assert time.monotonic() - started < 6
    assert error.message == "tools.py was not imported within 0.5 s"
    assert error.fix is not None
    assert "top level" in error.fix


def test_an_import_that_starts_processes_is_given_up(tmp_path: Path) -> None:
    code = "import subprocess, time\nfor _ in range(60): subprocess.Popen(['sleep', '20'])\ntime.sleep(20)\n"
    error = refused(tmp_path, code, limits=HostLimits(processes=30))
    assert error.message == "tools.py started more than 30 processes while it was imported"


@pytest.mark.parametrize(
    ("code", "message", "where"),
    [
        ("@tool\ndef f(): ...\n", 'the tool "f" has no docstring', "tools.py:2"),
        ("\n@tool\ndef f(x):\n    'Do it.'\n", 'the parameter "x" of the tool "f" has no type', "tools.py:3"),
        ("@tool\ndef f(*x: int):\n    'Do it.'\n", 'the tool "f" takes *x', "tools.py:2"),
        ("@tool\ndef f():\n    'Do it.'\n    yield 1\n", 'the tool "f" yields', "tools.py:2"),
        (
            "@tool\ndef f():\n    'Do it.'\n" * 2,
            'two tools are named "f"',
            "tools.py:2 and tools.py:5",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(
    tmp_path: Path, code: str, message: str, where: str
) -> None:
    error = refused(tmp_path, code)
    assert (error.message, error.where) == (message, where)
    assert error.fix


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, "@tool\ndef f(x): ...\n@tool\ndef g(y: bytes):\n    'Do it.'\n")
    assert error.message == "tools.py has 3 mistakes"
    assert error.details == (
        'tools.py:2: the tool "f" has no docstring',
        'tools.py:2: the parameter "x" of the tool "f" has no type',
        'tools.py:4: the parameter "y" of the tool "g": bytes cannot be written as JSON',
    )


def test_a_fault_in_a_helper_is_shown_there(tmp_path: Path) -> None:
    write(tmp_path, "\nraise RuntimeError('broken')\n", "helper.py")
    assert refused(tmp_path, "import helper\n").where == "helper.py:3"


def test_what_it_prints_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "print('loading')\n")
    with CodeHost(path, "tools", log=tmp_path / "out" / "tools.log", warm=False):
        pass
    assert (tmp_path / "out" / "tools.log").read_text() == "loading\n"
    assert capfd.readouterr() == ("", "")


def test_a_host_that_cannot_run_says_why(tmp_path: Path) -> None:
    def elsewhere(command: list[str]) -> list[str]:
        return ["/bin/sh", "-c", "echo no such image >&2; exit 125"]

    host = make_host(tmp_path, "", wrap=elsewhere)
    with pytest.raises(StartFailed) as caught:
        host.start()
    assert caught.value.message == "the process of tools.py did not start"
    assert caught.value.details == ("no such image",)
    assert caught.value.where == "tools.py"
    assert caught.value.fix
    assert host.pids() == set()


def test_it_may_run_behind_a_wrapper(tmp_path: Path) -> None:
    """Two pipes instead of one socket, as ``docker run -i`` has it."""

    def piped(command: list[str]) -> list[str]:
        return ["/bin/sh", "-c", 'cat | "$@" | cat', "sh", *command]

    from tests.usercode.projects import call, calls

    code = "import time\n@tool\ndef f(x: str) -> str:\n    'Echo.'\n    return x\n@tool\ndef hang() -> None:\n    'Hang.'\n    time.sleep(100)\n"
    host = make_host(tmp_path, code, wrap=piped)
    assert call(host, "f", x="y" * 300_000).omitted == 300_000 - 256 * 1024
    outcomes = calls(host, *[("f", {"x": "a"}, 10.0)] * 50, ("hang", {}, 0.5))
    assert [outcome.status for outcome in outcomes] == ["ok"] * 50 + ["timeout"]
    pids = host.pids()
    assert len(pids) >= 5
    host.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_file_that_changes_while_it_runs(tmp_path: Path) -> None:
    """Workers are copies of what was imported at the start."""
    from tests.usercode.projects import calls

    code = "import os, time\n@tool\ndef f() -> str:\n    'Which.'\n    time.sleep(0.1)\n    return 'first'\n"
    with make_host(tmp_path, code) as host:
        write(tmp_path, textwrap.dedent("raise RuntimeError\n"))
        outcomes = calls(host, *[("f", {}, 10.0)] * 8)
        assert {outcome.value for outcome in outcomes} == {"first"}


def test_workers_that_import_for_themselves_notice_a_changed_file(tmp_path: Path) -> None:
    from tests.usercode.projects import calls

    code = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n@tool\ndef f() -> str:\n    'Do it.'\n    return 'first'\n"
    with CodeHost(write(tmp_path, code), "tools", warm=False) as host:
        write(tmp_path, "raise RuntimeError('edited')\n")
        (outcome,) = calls(host, ("f", {}, 10.0))
        assert outcome.status == "died"
        assert outcome.error == ("a process of tools.py could not be started: RuntimeError: edited")
        write(tmp_path, code.replace("def f", "def g"))
        (outcome,) = calls(host, ("f", {}, 10.0))
        assert "'f' is no longer in tools.py" in (outcome.error or "")
        write(tmp_path, code)
        assert calls(host, ("f", {}, 10.0))[0].value == "first"
