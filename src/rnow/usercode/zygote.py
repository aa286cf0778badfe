"""A child that imports the user's file once and is then copied (fork) for every worker.

Copies share the memory of what was imported and start in milliseconds. A copy of a process with threads or open connections
is not safe to use, though: then the zygote only reports what it found, and workers import for themselves.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import NoReturn, TextIO

from rnow.usercode import frames, worker
from rnow.usercode.records import Settings
from rnow.usercode.user_file import ImportFault, UserFile, import_user_file

SYNC, ASYNC = b"s", b"a"
"""What the supervisor asks for, with the two sockets of the new worker."""

_OPEN_FILES = 4096


def run_zygote(control: socket.socket, settings: Settings, output: int) -> NoReturn:
    """Import, report READY or FAULT on ``control``, then make workers until it closes."""
    prepare(settings, keep=(control.fileno(),), output=output)
    before = _sockets()
    try:
        code = import_user_file(settings["file"], settings["kind"])
    except ImportFault as fault:
        _send(control, frames.FAULT, fault.report)
        leave(1)
    worker.flush_output()  # or every copy would write it again
    forks = len(os.listdir("/proc/self/task")) == 1 and _sockets() <= before  # noqa: PTH208
    code.report["forks"] = forks
    _send(control, frames.READY, code.report)
    if not forks:
        leave(0)
    if not settings["names"]:  # calls are numbered by the names that the first zygote found
        settings["names"] = [function["name"] for function in code.report["functions"]]
    gc.collect()
    gc.freeze()  # a collection in a worker would otherwise touch, and so copy, every page
    while True:
        wanted, files, _, _ = socket.recv_fds(control, 1, 2)
        if not wanted:
            leave(0)
        _fork_worker(control, code, settings, wanted == ASYNC, files)


def _fork_worker(
    control: socket.socket,
    code: UserFile,
    settings: Settings,
    is_async: bool,
    files: list[int],
) -> None:
    """Twice, so that the worker becomes a child of the supervisor, which is a subreaper and has to wait for it."""
    try:
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            try:
                if os.fork() == 0:
                    # Until then the supervisor could neither be named as its parent nor learn how it ended.
                    while os.getppid() == parent:
                        time.sleep(0.001)
                    control.close()
                    _become_worker(code, settings, is_async, files)
            finally:
                os._exit(0)
        os.waitpid(between, 0)
    except OSError:
        pass  # no more processes: the supervisor sees the sockets close
    finally:
        for file in files:
            os.close(file)


def run_importing_worker(
    inbox: socket.socket,
    outbox: socket.socket,
    settings: Settings,
    output: int,
    *,
    is_async: bool,
) -> NoReturn:
    """A worker that imports the file for itself."""
    inbox_file, outbox_file = inbox.detach(), outbox.detach()
    prepare(settings, keep=(inbox_file, outbox_file), output=output)
    try:
        code = import_user_file(settings["file"], settings["kind"])
    except ImportFault as fault:
        _refuse(outbox_file, f"{fault.report['type']}: {fault.report['message']}")
    _become_worker(code, settings, is_async, [inbox_file, outbox_file])


def _become_worker(
    code: UserFile, settings: Settings, is_async: bool, files: list[int]
) -> NoReturn:
    try:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        inbox, outbox = (socket.socket(fileno=file) for file in files)
        worker.serve(inbox, outbox, code, settings["names"], settings, is_async=is_async)
    except KeyError as error:
        _refuse(files[1], f"{error} is no longer in {code.file.name}")
    except BaseException as error:
        sys.stderr.write(f"a worker ended with {type(error).__name__}: {error}\n")
    leave(1)


def _refuse(outbox: int, problem: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(
            outbox,
            frames.pack(
                frames.HELLO, call=os.getpid(), body=problem.encode("utf-8", "replace")[:4000]
            ),
        )
    leave(1)


def prepare(settings: Settings, *, keep: Iterable[int], output: int) -> None:
    """Turn a fresh copy of the supervisor into a process for user code: its own session, nothing of ours open but
    ``keep``, stdin empty, stdout and stderr on ``output``, limits, environment, folder and path of the project."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _close_all_but({0, 1, 2, *keep})
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _text_file(1)
    sys.stderr = sys.__stderr__ = _text_file(2)
    _limit(settings)
    os.environ.update(settings["env"])
    sys.path.extend(entry for entry in settings["sys_path"] if entry not in sys.path)
    os.chdir(os.path.dirname(settings["file"]))  # noqa: PTH120


def _text_file(number: int) -> TextIO:
    """Written out line by line: the process may be killed at any moment."""
    return open(
        number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )


def _close_all_but(keep: set[int]) -> None:
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(entry) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(entry))


def _limit(settings: Settings) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    if settings["memory"]:
        # What a process may write to. RLIMIT_AS would count the terabytes that Chromium only reserves.
        _lower(resource.RLIMIT_DATA, settings["memory"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")  # when the machine runs out of memory, this goes before the trainer


def _lower(what: int, wanted: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(what, (wanted, wanted))


def _sockets() -> set[str]:
    """The sockets this process holds, by the kernel's names."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{entry}"))  # noqa: PTH115
    return {name for name in found if name.startswith("socket:")}


def _send(control: socket.socket, kind: int, report: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):
        body = json.dumps(report).encode()
        control.sendall(frames.pack(kind, body=body))


def leave(code: int) -> NoReturn:
    """End this copy at once, with what was printed written out: nothing of the supervisor's may run in it."""
    worker.flush_output()
    os._exit(code)
