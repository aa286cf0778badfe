"""Fault 17 of RELIABILITY: whatever user code does, the call is answered and the next one works."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.usercode.projects import call, calls, living, make_host, open_files, wait_until

import rnow
from rnow.usercode.host import CallOutcome, CodeHost, HostLimits

TOOLS = r'''
import asyncio, ctypes, os, signal, subprocess, sys, threading, time

@tool
def fine() -> int:
    """Answer."""
    return os.getpid()

@tool
async def async_fine(seconds: float = 0) -> int:
    """Answer."""
    await asyncio.sleep(seconds)
    return os.getpid()

class Unprintable(Exception):
    def __str__(self): raise RuntimeError("even this")

def deep(n): return deep(n + 1)

@tool
def fail(how: str) -> str:
    """Go wrong."""
    if how == "raise": raise ValueError("bad\nthing \x1b[31mred")
    if how == "unprintable": raise Unprintable
    if how == "exit": sys.exit(3)
    if how == "interrupt": raise KeyboardInterrupt
    if how == "deep": deep(0)
    if how == "memory": return len(bytearray(1 << 33))
    if how == "os_exit": os._exit(3)
    if how == "crash": ctypes.string_at(0)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "close": os.closerange(3, 256)
    if how == "alarm": signal.alarm(1); time.sleep(20)
    return "nothing went wrong"

@tool
async def async_fail(how: str) -> str:
    """Go wrong."""
    if how == "raise": raise ValueError("bad")
    if how == "exit": sys.exit(3)
    if how == "cancel": raise asyncio.CancelledError
    if how == "os_exit": os._exit(3)
    if how == "background":
        async def ends(): sys.exit(4)
        asyncio.get_running_loop().create_task(ends())
        await asyncio.sleep(0.1)
    return "nothing went wrong"

@tool
def hang(how: str) -> str:
    """Never end."""
    if how == "sleep": time.sleep(100)
    if how == "big number": return str(9**9**9)
    if how == "loop":
        while True:
            try: time.sleep(100)
            except BaseException: pass
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "100"])
        time.sleep(100)
    if how == "child": subprocess.run(["sleep", "100"])

@tool
async def async_hang(how: str) -> str:
    """Never end."""
    if how == "sleep": await asyncio.sleep(100)
    if how == "block": time.sleep(100)
    if how == "big number": return str(9**9**9)
    while True:
        try: await asyncio.sleep(100)
        except asyncio.CancelledError: pass

@tool
def bomb(how: str) -> str:
    """Start processes, 200 at most."""
    for n in range(200):
        if how == "fork":
            if os.fork() == 0:
                time.sleep(30); os._exit(0)
        else:
            subprocess.Popen(["sleep", "30"], start_new_session=True)
    time.sleep(30)

@tool
def noise(how: str) -> str:
    """Print a lot."""
    if how == "print":
        for n in range(200_000): print("noise", n)
    if how == "binary": os.write(1, bytes(range(256)) * 4000); os.write(2, b"\x00" * 1000)
    if how == "subprocess": subprocess.run("head -c 5000000 /dev/zero", shell=True)
    return "quiet again"

@tool
def leave_behind() -> int:
    """Start something and return."""
    return subprocess.Popen(["sleep", "100"]).pid
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeHost]:
    folder = tmp_path_factory.mktemp("project")
    limits = HostLimits(processes=40, memory_gb=2.0)
    with make_host(folder, TOOLS, limits=limits, log=folder / "tools.log") as host:
        yield host
        wait_until(lambda: len(host.pids()) < 10)


def works(host: CodeHost) -> None:
    assert [outcome.status for outcome in calls(host, ("fine", {}, 20), ("async_fine", {}, 20))] == ["ok", "ok"]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [
        ("raise", "raised", r"ValueError: bad thing \x1b[31mred"),
        ("unprintable", "raised", "Unprintable"),
        ("exit", "raised", "SystemExit: 3"),
        ("interrupt", "raised", "KeyboardInterrupt"),
        ("deep", "raised", "RecursionError: maximum recursion depth exceeded"),
        ("memory", "raised", "MemoryError"),
        ("os_exit", "died", "its process ended (exit code 3)"),
        ("crash", "died", "its process ended (signal 11)"),
        ("kill", "died", "its process ended (signal 9)"),
        ("close", "died", "its process ended (exit code 1)"),
        ("alarm", "died", "its process ended (signal 14)"),
    ],
)
def test_sync_faults(host: CodeHost, how: str, status: str, error: str) -> None:
    outcome = call(host, "fail", how=how)
    assert (outcome.status, outcome.error, outcome.value) == (status, error, None)
    works(host)


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [
        ("raise", "raised", "ValueError: bad"),
        ("exit", "raised", "SystemExit: 3"),
        ("cancel", "raised", "RuntimeError: it cancelled itself"),
        ("os_exit", "died", "its process ended (exit code 3)"),
        ("background", "ok", None),
    ],
)
def test_async_faults(host: CodeHost, how: str, status: str, error: str | None) -> None:
    outcome = call(host, "async_fail", how=how)
    assert (outcome.status, outcome.error) == (status, error)
    works(host)


def test_the_traceback_shows_the_users_lines_only(host: CodeHost) -> None:
    outcome = call(host, "fail", how="raise")
    assert outcome.place is not None
    assert outcome.place.startswith("tools.py:")
    assert outcome.detail is not None
    assert outcome.detail.startswith("Traceback (most recent call last):\n")
    assert "rnow/usercode" not in outcome.detail
    assert f'tools.py", line {outcome.place.partition(":")[2]}, in fail' in outcome.detail
    assert len(call(host, "fail", how="deep").detail or "") < 20_000


@pytest.mark.parametrize("how", ["sleep", "big number", "loop", "deaf", "child"])
def test_a_sync_hang_is_killed_in_time(host: CodeHost, how: str) -> None:
    works(host)
    started = time.monotonic()
    outcome = call(host, "hang", how=how, timeout=0.5)
    assert time.monotonic() - started < 1.5
    assert (outcome.status, outcome.error) == ("timeout", "took longer than 0.5 s")
    works(host)


@pytest.mark.parametrize("how", ["sleep", "block", "big number", "stubborn"])
def test_an_async_hang_is_ended_in_time(host: CodeHost, how: str) -> None:
    works(host)
    started = time.monotonic()
    outcome = call(host, "async_hang", how=how, timeout=0.3)
    assert time.monotonic() - started < 1.8
    assert (outcome.status, outcome.error) == ("timeout", "took longer than 0.3 s")
    works(host)


def test_a_patient_timeout_leaves_the_other_calls_alone(host: CodeHost) -> None:
    before = call(host, "async_fine").value
    hung, fine = calls(
        host, ("async_hang", {"how": "stubborn"}, 0.2), ("async_fine", {"seconds": 1}, 20)
    )
    assert (hung.status, fine.status, fine.value) == ("timeout", "ok", before)


def test_a_blocked_loop_takes_the_other_calls_with_it(host: CodeHost) -> None:
    async def both() -> list[CallOutcome]:
        other = asyncio.create_task(
            host.call("async_fine", {"arguments": {"seconds": 30}}, timeout=60)
        )
        await asyncio.sleep(0.2)
        blocked = host.call("async_hang", {"arguments": {"how": "block"}}, timeout=0.3)
        return list(await asyncio.gather(blocked, other))

    blocked, other = asyncio.run(both())
    assert blocked.status == "timeout"
    assert other.status == "died"
    assert other.error == "was ended with its process, which another call had blocked"
    works(host)


def test_calls_that_will_not_end_do_not_pile_up(tmp_path: Path) -> None:
    with make_host(tmp_path, TOOLS) as host:
        before = call(host, "async_fine").value
        outcomes = calls(host, *[("async_hang", {"how": "stubborn"}, 0.2)] * 20)
        assert {outcome.status for outcome in outcomes} <= {"timeout", "died"}
        wait_until(lambda: call(host, "async_fine").value != before)


def test_calls_beside_a_hang_are_answered(host: CodeHost) -> None:
    wanted = [("fine", {}, 20.0)] * 60 + [("hang", {"how": "big number"}, 1.0)] * 2
    outcomes = calls(host, *wanted, *[("fine", {}, 20.0)] * 60)
    assert [outcome.status for outcome in outcomes].count("ok") == 120
    assert [outcome.status for outcome in outcomes].count("timeout") == 2


def test_a_hang_takes_its_children_with_it(host: CodeHost) -> None:
    wait_until(lambda: True)
    before = host.pids()
    call(host, "hang", how="deaf", timeout=0.5)
    wait_until(lambda: len(host.pids() - before) <= 1)  # the worker that replaced it


@pytest.mark.parametrize("how", ["fork", "session"])
def test_a_fork_bomb_is_found_and_ended(host: CodeHost, how: str) -> None:
    started = time.monotonic()
    outcome = call(host, "bomb", how=how, timeout=25)
    assert time.monotonic() - started < 15
    assert (outcome.status, outcome.error) == ("died", "started more than 40 processes")
    wait_until(lambda: len(host.pids()) < 45)
    works(host)


@pytest.mark.parametrize("how", ["print", "binary", "subprocess"])
def test_noise_reaches_nobody(host: CodeHost, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(host, "noise", how=how).value == "quiet again"
    assert capfd.readouterr() == ("", "")


def test_the_log_is_small(host: CodeHost) -> None:
    call(host, "noise", how="print")
    log = host.file.parent / "tools.log"
    assert log.stat().st_size <= (1 << 20) + 100
    assert log.stat().st_mode & 0o777 == 0o600


def test_noise_without_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with make_host(tmp_path, TOOLS) as host:
        assert call(host, "noise", how="print").value == "quiet again"
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["tools.py"]


def test_cancelling_a_call_ends_the_function(host: CodeHost) -> None:
    works(host)

    async def cancelled(name: str, how: str) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                host.call(name, {"arguments": {"how": how}}, timeout=100), timeout=0.3
            )

    before = {pid: _start_time(pid) for pid in host.pids()}
    for name, how in (("hang", "big number"), ("async_hang", "sleep"), ("async_hang", "block")):
        asyncio.run(cancelled(name, how))
    works(host)
    wait_until(lambda: not _busy(host), 5)
    assert set(before) != host.pids()  # the hanging ones were killed


def _start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _busy(host: CodeHost) -> bool:
    """Whether a process of the host is computing."""
    found = []
    for pid in host.pids():
        try:
            found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue
    return "R" in found


@pytest.mark.parametrize("who", ["zygote", "supervisor"])
def test_what_is_killed_from_outside_comes_back(host: CodeHost, who: str) -> None:
    works(host)
    (supervisor,) = [pid for pid in host.pids() if _parent(pid) == _leash(host)]
    # The zygote is the supervisor's first child.
    zygote = min(pid for pid in host.pids() if _parent(pid) == supervisor)
    victim = zygote if who == "zygote" else supervisor
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not living(victim))
    if who == "zygote":
        outcomes = calls(host, *[("hang", {"how": "sleep"}, 0.3)] * 4)
        assert {outcome.status for outcome in outcomes} == {"timeout"}
    else:
        outcome = call(host, "fine")
        assert outcome.status in ("died", "ok")
        wait_until(lambda: host._socket is None or call(host, "fine").status == "ok")
    works(host)


def test_a_call_that_kills_the_supervisor_is_answered(tmp_path: Path) -> None:
    code = """
    import os
    @tool
    def parricide() -> None:
        '''Kill the parent.'''
        os.kill(os.getppid(), 9)
    @tool
    def fine() -> None:
        '''Answer.'''
    """
    with make_host(tmp_path, code) as host:
        outcome = call(host, "parricide")
        assert outcome.status == "died"
        assert outcome.error == "the process of tools.py failed: it ended"
        assert call(host, "fine").status == "ok"


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_supervisor_that_stops_answering_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.host._LOOK", 0.03)
    with make_host(tmp_path, TOOLS) as host:
        works(host)
        assert host._process is not None
        for pid in host.pids():
            if _parent(pid) == _leash(host):
                os.kill(pid, signal.SIGSTOP)
        outcome = call(host, "fine")
        assert outcome.error == "the process of tools.py failed: it stopped answering"
        works(host)


def test_a_blocked_event_loop_is_not_a_silent_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a model samples on the CPU while a call runs."""
    monkeypatch.setattr("rnow.usercode.host._LOOK", 0.02)
    monkeypatch.setattr("rnow.usercode.host._PATIENCE", 2)

    async def body(host: CodeHost) -> CallOutcome:
        running = asyncio.ensure_future(
            host.call("async_fine", {"arguments": {"seconds": 1}}, timeout=20)
        )
        while not running.done():
            await asyncio.sleep(0)
            time.sleep(0.3)
        return await running

    with make_host(tmp_path, TOOLS) as host:
        assert asyncio.run(body(host)).status == "ok"


OWNER = """
import asyncio, sys
from pathlib import Path
from rnow.usercode.host import CodeHost
host = CodeHost(Path(sys.argv[1]), "tools")
async def main():
    running = [
        host.call("hang", {"arguments": {"how": how}}, timeout=100) for how in ("big number", "deaf", "child")
    ]
    running += [host.call("leave_behind", {"arguments": {}}, timeout=100)]
    running += [host.call("async_hang", {"arguments": {"how": "block"}}, timeout=100)]
    tasks = [asyncio.create_task(call) for call in running]
    await asyncio.sleep(1.5)
    print(*host.pids(), flush=True)
    if sys.argv[2] == "exit":
        sys.exit(0)
    await asyncio.gather(*tasks)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_nothing_outlives_its_owner(tmp_path: Path, how: str) -> None:
    host = make_host(tmp_path, TOOLS)  # never started here: only its file is used
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(host.file), how],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(rnow.__file__).parents[1])},
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) >= 9
    if how == "kill":
        owner.kill()
    owner.wait(20)
    owner.stdout.close()
    wait_until(lambda: not any(living(pid) for pid in pids), 15)


def test_memory_files_and_processes_stay_flat_over_2000_calls(tmp_path: Path) -> None:
    """Fault 27. Every hundredth call hangs or dies, so that workers are replaced too."""
    with make_host(tmp_path, TOOLS, limits=HostLimits(workers=4)) as host:

        def some(count: int) -> None:
            wanted = [("fine", {}, 20.0), ("async_fine", {}, 20.0)] * (count // 2 - 1)
            calls(
                host, *wanted, ("fail", {"how": "os_exit"}, 20.0), ("hang", {"how": "sleep"}, 0.05)
            )

        def measure() -> tuple[int, int, int, float]:
            wait_until(lambda: not _busy(host))
            supervisor = min(pid for pid in host.pids() if _parent(pid) == _leash(host))
            held = len(os.listdir(f"/proc/{supervisor}/fd"))  # noqa: PTH208
            return open_files(), len(host.pids()), held, _megabytes(supervisor)

        for _ in range(3):
            some(100)
        ours, pids, theirs, memory = measure()
        for _ in range(20):
            some(100)
        after = measure()
        assert after[0] <= ours + 1
        assert after[1] <= pids + 1
        assert after[2] <= theirs + 4
        assert after[3] <= memory + 4


def _leash(host: CodeHost) -> int:
    assert host._process is not None
    assert host._process._popen is not None
    return host._process._popen.pid


def _megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def test_hosts_that_are_forgotten_end(tmp_path: Path) -> None:
    host = make_host(tmp_path, textwrap.dedent(TOOLS))
    works(host)
    pids, files = host.pids(), open_files()
    del host
    import gc

    gc.collect()
    wait_until(lambda: not any(living(pid) for pid in pids))
    assert open_files() < files


STOPS = '''
import os, signal, time

@tool
def parent() -> int:
    """Answer."""
    return os.getppid()

@tool
def step(what: str) -> str:
    """Answer, sometimes late."""
    if what == "stop":
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(0.3)
    if what == "long":
        time.sleep(0.6)
    return what
'''


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_cancelling_a_call_that_has_just_ended_harms_no_other(tmp_path: Path) -> None:
    """The cancellation is read before the answer, when the worker is at the next call already."""
    with make_host(tmp_path, STOPS, limits=HostLimits(workers=1)) as host:
        supervisor = int(call(host, "parent").value)

        async def both() -> CallOutcome:
            first, second = (
                asyncio.ensure_future(host.call("step", {"arguments": {"what": what}}, timeout=20))
                for what in ("stop", "long")
            )
            while not stopped(supervisor):  # as it is once the first call has begun
                await asyncio.sleep(0.02)
            first.cancel()
            await asyncio.sleep(0.35)
            os.kill(supervisor, signal.SIGCONT)
            return await second

        assert asyncio.run(both()) == CallOutcome(status="ok", value="long")
