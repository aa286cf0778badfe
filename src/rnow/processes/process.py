"""Child processes: started, watched, never left behind."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from rnow.errors import ModelError, RnowError, TemporaryError
from rnow.processes import leash

MARK = "RNOW_LEASH"
"""Environment variable by which the processes of one ManagedProcess know each other."""

_TAIL_BYTES = 64 * 1024
_READY_INTERVAL = 0.25


class ProcessFailed(TemporaryError):
    """A process that rnow started ended or stopped answering during training."""


class StartFailed(ModelError):
    """A process that rnow starts did not come up."""

    default_title = "A server did not start"


class ManagedProcess:
    """A command with its log, run under the leash: it and all that it starts end with this process,
    ``kill -9`` included.

    ``env`` is added to this process's environment (None: nothing added), or is all of it (``only_env``). stdin is empty;
    stdout and stderr are appended to ``log``, which only this user can read. With ``stdio``, a file descriptor open for both
    directions, stdin and stdout are that instead. A stopped process may be started again.

    >>> with ManagedProcess(["sleep", "60"], log=Path("sleep.log"), name="sleep") as process:  # doctest: +SKIP
    ...     await process.wait_until(is_ready, timeout=30)
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path,
        name: str,
        pass_fds: Sequence[int] = (),
        only_env: bool = False,
        stdio: int | None = None,
    ) -> None:
        self.command = tuple(command)
        self.name = name
        self.log = log
        self._env = dict(env or {})
        self._pass_fds = tuple(pass_fds)
        self._only_env = only_env
        self._stdio = stdio
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._mark = ""
        self._owner = 0
        self._log_start = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the command.

        Raises:
            RuntimeError: it is running already.
            OSError: the log cannot be written.
        """
        if self.alive():
            raise RuntimeError(f"{self.name} is running already")
        self.stop()
        self._mark = secrets.token_hex(8)
        # SPT_NOENV: programs that set their process title (vLLM) would overwrite the mark in /proc otherwise.
        inherited = {} if self._only_env else os.environ
        env = inherited | self._env | {MARK: self._mark, "SPT_NOENV": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                self._log_start = os.fstat(log).st_size
                # By its path and isolated: neither PYTHONPATH nor the working directory can get in its way.
                tied = [sys.executable, "-I", "-S", leash.__file__, "--fd", str(read_end), "--"]
                self._popen = subprocess.Popen(
                    [*tied, *self.command],
                    env=env,
                    stdin=subprocess.DEVNULL if self._stdio is None else self._stdio,
                    stdout=log if self._stdio is None else self._stdio,
                    stderr=log,
                    pass_fds=(read_end, *self._pass_fds),
                    start_new_session=True,
                )
            finally:
                os.close(log)
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        self._pipe, self._owner = write_end, os.getpid()
        _running.add(self)

    def pids(self) -> set[int]:
        """Ids of the command and of every process it started that lives."""
        return leash.descendants(self._popen.pid) if self._popen and self.alive() else set()

    def alive(self) -> bool:
        """Whether the command runs."""
        return self._popen is not None and self._popen.poll() is None

    def exit_code(self) -> int | None:
        """The command's exit code, negative for a signal; None while it runs or before it was started."""
        return self._popen.poll() if self._popen else None

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines that this start wrote, without their ends."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return text.splitlines()[-lines:]

    async def wait_until(self, ready: Callable[[], Awaitable[bool]], *, timeout: float) -> None:
        """Ask ``ready`` again and again until it says yes. Does not stop the process when it gives up.

        Raises:
            StartFailed: the process ended, or ``timeout`` seconds passed; with the end of the log.
        """
        deadline = time.monotonic() + timeout
        while True:
            if not self.alive():
                raise self.failure("ended while it started", StartFailed)
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.failure(f"was not ready after {timeout:g} s", StartFailed)
            with contextlib.suppress(TimeoutError):
                if await asyncio.wait_for(ready(), left):
                    return
            await asyncio.sleep(_READY_INTERVAL)

    def failure(self, what: str, error: type[RnowError] = ProcessFailed) -> RnowError:
        """An error saying that this process did ``what``, with its exit code and the end of its log."""
        code = self.exit_code()
        ending = ""
        if code is not None:
            ending = f" (signal {-code})" if code < 0 else f" (exit code {code})"
        return error(
            f"{self.name} {what}{ending}",
            details=self.log_tail(),
            fix=f"the whole log is {self.log}",
        )

    def stop(self, grace: float = 5.0) -> None:
        """End the whole tree: SIGTERM, SIGKILL after ``grace`` seconds, and wait until it is gone. Idempotent."""
        with self._lock:
            popen, pipe = self._popen, self._pipe
            self._pipe = None
            if popen is None or self._owner != os.getpid():
                return  # a forked child has no business with its parent's processes
            if pipe is not None:
                with contextlib.suppress(OSError):
                    os.write(pipe, f"{grace}\n".encode())
                os.close(pipe)
            try:
                popen.wait(grace + leash.GRACE + 10)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
            if pipe is not None:
                # Normally nothing: this is for a tree whose leash was killed before it could do its work.
                leash.end_all(lambda: leash.marked(MARK, self._mark), 0.0, lambda: None)
            _running.discard(self)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now. It may be taken before the caller uses it: whoever starts a server on it must try
    another one when the server says that the address is in use."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def family_of(host: str) -> socket.AddressFamily:
    """Of sockets that listen at an address or a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


_running: weakref.WeakSet[ManagedProcess] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A normal exit ends everything at once instead of leaving it to the leash."""
    for process in list(_running):
        process.stop()


def _forget_in_child() -> None:
    """A forked child must not hold the pipe: while it lived, the leash would take this process for alive."""
    for process in list(_running):
        if process._pipe is not None:
            with contextlib.suppress(OSError):
                os.close(process._pipe)
            process._pipe = None


os.register_at_fork(after_in_child=_forget_in_child)
