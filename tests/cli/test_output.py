"""What is shown never decides what is done, and never the exit code."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from rnow.__main__ import main
from rnow.cli.output import Outlet, print_json
from rnow.display.display import Harmless, QuietDisplay
from rnow.display.downloads import Download

SAY = """
import sys
from rnow.cli.leave import leave
from rnow.cli.output import Outlet, print_json

for number in range(3):
    Outlet(sys.stdout).write(f"line {number}\\n")
    Outlet(sys.stderr).write(f"line {number}\\n")
sys.stdout.write("held back until the end")
leave(7)
"""
LATE = """
import atexit, threading, time
from rnow.cli import leave
leave.LEAVE_SECONDS = 0.3
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()
leave.leave(7)
"""


CROWDED = """
import sys, threading
from rnow.cli.leave import leave

def start(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = start
sys.stdout.write("held back until the end")
leave(7)
"""


def test_the_exit_code_needs_no_thread() -> None:
    ended = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"held back until the end", b"")


def closed() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize("make", [closed, full, gone_terminal])
def test_a_stream_that_takes_nothing_is_no_fault(make: Callable[[], int]) -> None:
    shown_on = make()
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, "-c", SAY], stdout=shown_on, stderr=shown_on, env=buffered, timeout=60
    )
    os.close(shown_on)
    assert ended.returncode == 7


@pytest.mark.parametrize("words", ["--help", "run --help", "--version", "nonsense"])
@pytest.mark.parametrize("to", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_nor_is_it_for_what_a_library_prints(words: str, to: str) -> None:
    expected = 2 if words == "nonsense" else 0
    command = f"{sys.executable} -m rnow {words} {to}"
    assert subprocess.run(command, shell=True, timeout=60).returncode == expected


def test_a_document_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no stream where the program was started without one."""
    monkeypatch.setattr(sys, "stdout", None)
    print_json({"steps": 2})


def test_what_wants_something_at_exit_is_not_waited_for() -> None:
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", LATE], timeout=50).returncode == 7
    assert time.monotonic() - began < 30


def test_a_reader_that_stops_reading_holds_up_nobody() -> None:
    read_end, write_end = os.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    os.write(write_end, b"." * size)
    with os.fdopen(write_end, "w") as stream:
        outlet = Outlet(stream, aside=True)
        began = time.monotonic()
        for _ in range(5000):
            outlet.write("more\n")
        outlet.settle(0.2)
        assert time.monotonic() - began < 5
        os.read(read_end, size)  # it goes on reading
        outlet.settle(10)
        assert os.read(read_end, 5) == b"more\n"
        os.close(read_end)


def test_letters_that_an_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Outlet(stream).write("ä")
    assert raw.getvalue() == rb"\xe4"


def test_ctrl_c_while_the_program_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def read(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "rnow.cli.main":
            raise KeyboardInterrupt
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", read)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_a_line_from_a_signal_in_the_middle_of_another_is_no_fault() -> None:
    """Python refuses to write to a stream in the middle of a write to it."""

    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            if text == "stopping":
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
            return super().write(text)

    stream = Busy()
    outlet = Outlet(stream)
    for text in ("a", "stopping", "b"):
        outlet.write(text)
    assert stream.getvalue() == "ab"


@pytest.mark.parametrize("fault", [OSError("gone"), SystemExit(1), ValueError("odd")])
def test_no_fault_of_a_display_reaches_the_loop(
    fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(QuietDisplay):
        def __getattribute__(self, name: str) -> object:
            raise fault

    display = Harmless(Broken())
    display.start([])
    display.stage("rollout")
    display.download(Download(name="m", done=1, total=2, rate=1.0))
    display.step(1, 2, {})
    display.saved(1, "checkpoints/step-000001")
    display.note("n")
    display.warn("w")
    display.evaluation("before", {})
    display.finish([])
    display.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the display failed; the run goes on"
    ]
