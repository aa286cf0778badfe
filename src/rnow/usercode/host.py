"""Running a user's functions from here, while they run elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from rnow.processes.process import ManagedProcess, StartFailed
from rnow.text.redact import Redactor
from rnow.types import ToolContext
from rnow.usercode import frames, supervisor
from rnow.usercode.environment import (
    BASE,
    base_environment,
    declared,
    hidden_values,
    plainly_secret,
    words_of,
)
from rnow.usercode.functions import (
    IMPORT_TIMEOUT,
    FunctionInfo,
    Kind,
    fix_missing,
    how_it_ended,
    import_error,
    read_functions,
)
from rnow.usercode.log import OutputLog
from rnow.usercode.records import Fault, Settings
from rnow.usercode.text import escape

if TYPE_CHECKING:
    from rnow.usercode.sandbox import Sandboxes

Wrap = Callable[[list[str]], list[str]]

_SUPERVISOR = Path(supervisor.__file__)
_PACKAGES = str(_SUPERVISOR.parents[2])
_START_SLACK = 30.0
_LOOK = 1.0  # seconds between two looks while calls run
_PATIENCE = (
    10  # looks after which a supervisor that says nothing is asked, and after as many more given up
)
_CHUNK = 256 * 1024
_CLOSE_SECONDS = 4.0
_MAX_ERROR = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What user code may take, besides 256 async calls at once, 4096 open files of a process and 256 kB of a tool's text.

    ``memory_gb``: what one process may write to (RLIMIT_DATA; address space that is only reserved does not count, so
    Chromium lives with it), None for no limit. ``processes``: that one worker may start. ``workers``: for sync functions,
    one call each.
    """

    memory_gb: float | None = 4.0
    processes: int = 256
    workers: int = 32


Status = Literal["ok", "raised", "invalid", "timeout", "died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutcome:
    """How a call ended. Secrets are taken out of every text.

    ``value`` is a tool's text or a reward's number, None unless ``status`` is ``ok``. ``error`` is one line for the model:
    ``raised`` an exception, ``invalid`` result of a reward, ``timeout``, or ``died`` with its process. ``place`` is the
    line of the function's file that raised, ``fix`` what to do about it where that is known, ``detail`` the traceback. ``omitted`` counts the bytes cut off the end of
    ``value``. ``passing``: the same call may work later (``JudgeUnavailable``).
    """

    status: Status
    value: str | float | None = None
    error: str | None = None
    place: str | None = None
    fix: str | None = None
    detail: str | None = None
    omitted: int = 0
    passing: bool = False


class _Broken(Exception):
    """The supervisor is gone or talks nonsense."""


class CodeHost:
    """The processes that run one user file. Not to be shared between threads; several event loops one after another are fine.

    Args:
        file: tools.py or rewards.py; its folder is where the code runs.
        secrets: the project's ``.env``. Of these and of our environment, the code gets what it names
            (``rnow.usercode.environment``); all of them are kept out of results and the log.
        env: added to the environment of the user's code; wins.
        log: where what it prints goes (1 MB at most); None = nowhere.
        wrap: turns the command that starts the host into one that starts it elsewhere (a container, with its stdin and
            stdout). The project's folder and rnow's package folder must be there under the same paths.
        sys_path: where else the code may import from; default: where this process may.
        import_timeout: seconds that importing the file may take.
        warm: have a worker ready before the first call.
    """

    def __init__(
        self,
        file: Path,
        kind: Kind,
        *,
        secrets: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        limits: HostLimits | None = None,
        wrap: Wrap | None = None,
        sys_path: Sequence[str] | None = None,
        import_timeout: float = IMPORT_TIMEOUT,
        warm: bool = True,
    ) -> None:
        self.file = Path(file).absolute()
        self.kind: Kind = kind
        self._given_secrets = dict(secrets or {})
        self._log_file = log
        self._limits = limits or HostLimits()
        self._wrap = wrap or (lambda command: command)
        self._elsewhere = wrap is not None
        self._sys_path = sys.path if sys_path is None else sys_path
        self._import_timeout = import_timeout
        self._warm = warm
        words = words_of(self.file)
        self._secrets = declared(self._given_secrets, words)
        shell = {name: value for name, value in os.environ.items() if name not in BASE}
        exported = declared(shell, words)
        self._env = exported | self._secrets | dict(env or {})
        exposed = hidden_values(base_environment() | self._env)
        self._redact = Redactor(exposed | self._given_secrets)
        self._redact_value = Redactor(exposed | plainly_secret(self._given_secrets))
        self._log = OutputLog(log, self._redact) if log is not None else None
        self._functions: list[FunctionInfo] = []
        self._numbers: dict[str, int] = {}
        self._known: set[str] = set()
        self._process: ManagedProcess | None = None
        self._socket: socket.socket | None = None
        self._errors = -1
        self._end: weakref.finalize[..., object] | None = None
        self._incoming = frames.FrameReader(frames.MAX_ANSWER)
        self._outgoing = bytearray()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Future[None] | None = None
        self._flushing = False
        self._writing = False
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._next_call = 0
        self._silent = 0
        self._watch: asyncio.TimerHandle | None = None

    def elsewhere(
        self, wrap: Wrap, *, sys_path: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> CodeHost:
        """A host like this one that runs where ``wrap`` takes it."""
        return CodeHost(
            self.file,
            self.kind,
            secrets=self._given_secrets,
            env=env,
            log=self._log_file,
            limits=self._limits,
            wrap=wrap,
            sys_path=sys_path,
            import_timeout=self._import_timeout,
        )

    @property
    def functions(self) -> list[FunctionInfo]:
        """What the file offers; starts the host when it has not been."""
        self.start()
        return list(self._functions)

    # -- start and end

    def start(self) -> None:
        """Start it and wait until the file is imported; idempotent.

        Raises:
            InputError: the file cannot be imported, or a function in it is wrong.
            StartFailed: the process itself does not come up.
        """
        with self._lock:
            if self._socket is not None:
                return
            try:
                self._start()
            except BaseException:
                self._drop()
                raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # Its own words, if it has any, are few: they are kept in memory and shown when it does not come up.
        self._errors = os.memfd_create("rnow-host")
        process = ManagedProcess(
            self._wrap([sys.executable, "-I", str(_SUPERVISOR)]),
            env=base_environment(),
            only_env=True,
            stdio=theirs.fileno(),
            log=Path(f"/proc/{os.getpid()}/fd/{self._errors}"),
            name=f"the process of {self.file.name}",
        )
        self._process = process
        self._incoming = frames.FrameReader(frames.MAX_ANSWER)
        self._end = weakref.finalize(self, _end_process, process, ours, self._errors)
        with theirs:
            process.start()
        deadline = time.monotonic() + self._import_timeout + _START_SLACK
        try:
            ours.sendall(frames.pack(frames.START, body=json.dumps(self._settings()).encode()))
            kind, body = self._first_word(ours, deadline)
        except (OSError, _Broken) as error:
            raise self._start_failed(process, error) from None
        if kind == frames.FAULT:
            report = json.loads(body)
            refusal = import_error(report, self.file, timeout=self._import_timeout)
            refusal.rewrite(self._redact)
            raise refusal
        self._functions = read_functions(json.loads(body), self.file, self.kind)
        self._numbers = {info.name: number for number, info in enumerate(self._functions)}
        self._known.update(self._numbers)
        ours.setblocking(False)
        self._socket = ours  # from now on it is running, for those who look

    def _settings(self) -> Settings:
        limits = self._limits
        memory = limits.memory_gb
        return {
            "file": str(self.file),
            "kind": self.kind,
            "env": self._env,
            "secrets": self._secrets,
            "sys_path": [entry for entry in [*self._sys_path, _PACKAGES] if entry],
            "import_timeout": self._import_timeout,
            "memory": None if memory is None else int(memory * (1 << 30)),
            "processes": limits.processes,
            "workers": limits.workers,
            "log": self._log is not None,
            "warm": self._warm,
            "names": [],
        }

    def _first_word(self, ours: socket.socket, deadline: float) -> tuple[int, bytes]:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Broken("it did not answer")
            ours.settimeout(min(left, 1.0))
            try:
                data = ours.recv(_CHUNK)
            except TimeoutError:
                continue
            if not data:
                raise _Broken("it ended")
            for kind, _, _, _, body in self._messages(data):
                if kind in (frames.READY, frames.FAULT):
                    return kind, body

    def _start_failed(self, process: ManagedProcess, error: Exception) -> StartFailed:
        details = [escape(self._redact(line)) for line in process.log_tail()]
        return StartFailed(
            f"the process of {self.file.name} did not start",
            title="User code cannot be run",
            where=self.file.name,
            why=str(error) or None,
            details=details,
            fix=f"free memory and processes of this machine if it is short of them; `python {self.file.name}` shows whether "
            "the file itself ends",
        )

    def close(self) -> None:
        """End it and everything it started; idempotent. A later call starts it anew."""
        with self._lock:
            self._detach()
            ours = self._socket
            if ours is not None:
                # What it printed last is still on the way.
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_WR)
                    ours.setblocking(True)
                    deadline = time.monotonic() + _CLOSE_SECONDS
                    while (left := deadline - time.monotonic()) > 0:
                        ours.settimeout(left)
                        data = ours.recv(_CHUNK)
                        if not data:
                            break
                        with contextlib.suppress(_Broken):
                            self._messages(data)
            self._drop()

    def _drop(self) -> None:
        if self._end is not None:
            self._end()
        self._end = self._process = self._socket = None
        self._outgoing.clear()  # half a message would be nonsense to the next one
        self._errors = -1
        if self._log is not None:
            self._log.close()

    def pids(self) -> set[int]:
        """Ids of every process of this host that lives."""
        return self._process.pids() if self._process is not None else set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- calls

    async def call(
        self, name: str, payload: Mapping[str, object], *, timeout: float
    ) -> CallOutcome:
        """Run a function. What it does wrong is an outcome; cancelling this ends the function too.

        Args:
            payload: JSON. Tools: ``arguments``, ``metadata``, ``variables``, ``episode``; rewards: ``messages``, ``metadata``,
                ``variables``.
            timeout: seconds from when a worker takes it up.

        Raises:
            KeyError: there is no such function.
            InputError, StartFailed: the host is not running and cannot be started.
        """
        loop = asyncio.get_running_loop()
        if self._socket is None:
            await self._start_beside(loop)
        number = self._numbers.get(name)
        if number is None:
            if name in self._known:  # the file was changed and the host had to start again
                return CallOutcome(status="died", error=f"it is no longer in {self.file.name}")
            raise KeyError(name)
        try:
            body = json.dumps(payload, default=str).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return CallOutcome(status="invalid", error=f"it cannot be given these values: {error}")
        if len(body) > frames.MAX_BODY:
            return CallOutcome(status="invalid", error="it was given more than 64 MB")
        self._attach(loop)
        self._next_call += 1
        call = self._next_call
        future = self._pending[call] = loop.create_future()
        message = frames.pack(
            frames.CALL, call=call, function=number, seconds=timeout, body=body
        )  # fmt: skip
        self._send(message)
        if self._watch is None:
            self._silent = 0
            self._watch = loop.call_later(_LOOK, self._look)
        try:
            answer = await future
        except asyncio.CancelledError:
            if self._pending.pop(call, None) is not None:
                self._send(frames.pack(frames.CANCEL, call=call))
                self._flush()  # the loop may be ending
            raise
        return read_outcome(
            answer,
            timeout=timeout,
            file=self.file,
            elsewhere=self._elsewhere,
            redact=self._redact,
            redact_value=self._redact_value,
        )

    async def _start_beside(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start without blocking the loop; whoever else wants it waits for the same start."""
        starting = self._starting
        if starting is None or starting.done() or starting.get_loop() is not loop:
            starting = self._starting = loop.run_in_executor(None, self.start)
        await asyncio.shield(starting)

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop:
            return
        self._detach()
        assert self._socket is not None
        loop.add_reader(self._socket.fileno(), self._read)
        self._loop = loop

    def _detach(self) -> None:
        """Leave the loop. Whatever it still waited for is not awaited by anybody any more."""
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed() and self._socket is not None:
            loop.remove_reader(self._socket.fileno())
            if self._writing:
                loop.remove_writer(self._socket.fileno())
        self._writing = self._flushing = False
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for call, future in self._pending.items():
            self._outgoing += frames.pack(frames.CANCEL, call=call)
            if loop is not None and not loop.is_closed() and not future.done():
                future.cancel()
        self._pending.clear()

    def _send(self, message: bytes) -> None:
        """Messages of one turn of the loop leave together."""
        self._outgoing += message
        if not self._flushing and self._loop is not None:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._socket is None or self._loop is None:
            return
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._lost("it ended")
            return
        wanted = bool(self._outgoing)
        if wanted and not self._writing:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        elif not wanted and self._writing:
            self._loop.remove_writer(self._socket.fileno())
        self._writing = wanted

    def _read(self) -> None:
        if self._socket is None:
            return
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost("it ended")
            return
        self._silent = 0
        try:
            for kind, call, _, _, body in self._messages(data):
                if kind == frames.RESULT:
                    future = self._pending.pop(call, None)
                    if future is not None and not future.done():
                        future.set_result(body)
        except _Broken as error:
            self._lost(str(error))

    def _messages(self, data: bytes) -> list[frames.Frame]:
        """What ``data`` completes; output of the user's code goes to the log."""
        found = []
        try:
            for message in self._incoming.feed(data):
                frame = frames.unpack(message)
                if frame[0] != frames.LOG:
                    found.append(frame)
                elif self._log is not None:
                    self._log.write(frame[4])
        except frames.BadFrame as error:
            raise _Broken(f"it sent {error}") from None
        return found

    def _look(self) -> None:
        """The supervisor keeps the clocks of all calls; this makes sure that it lives.

        Counted in looks, each of which comes after a chance to read, not in seconds: a model that samples in this thread
        blocks the loop for as long as it likes, and the supervisor would be taken for silent.
        """
        self._watch = None
        loop = self._loop
        if loop is None:
            return
        if not self._pending:
            if self._log is not None and self._log.waiting:
                self._log.flush()
            return
        self._silent += 1
        if self._silent > 2 * _PATIENCE:
            self._lost("it stopped answering")
            return
        if self._silent == _PATIENCE:
            self._send(frames.pack(frames.PING))
        self._watch = loop.call_later(_LOOK, self._look)

    def _lost(self, why: str) -> None:
        """All that was running fails; the next call starts the host anew."""
        pending, self._pending = self._pending, {}
        body = json.dumps({"fault": "host", "why": why}).encode()
        self._detach()
        self._drop()
        for future in pending.values():
            if not future.done():
                future.set_result(body)


def load_functions(
    file: Path,
    kind: Kind,
    *,
    secrets: Mapping[str, str] | None = None,
) -> list[FunctionInfo]:
    """The functions of ``file`` and of the helper modules it imports, in the order in which they are decorated.

    The file is imported in a child process, which ends before this returns. The rest is as for CodeHost.

    Raises:
        CannotImport: the file cannot be imported in time, or a function is wrong; with the file and line.
    """
    with CodeHost(file, kind, secrets=secrets, warm=False) as host:
        return host.functions


def _end_process(process: ManagedProcess, ours: socket.socket, errors: int) -> None:
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_WR)
    process.stop(grace=0.5)
    ours.close()
    os.close(errors)


def read_outcome(
    body: bytes,
    *,
    timeout: float,
    file: Path,
    elsewhere: bool = False,
    redact: Redactor,
    redact_value: Redactor,
) -> CallOutcome:
    """The body of a RESULT.

    Args:
        file: the user's file.
        elsewhere: it runs in a sandbox.
        redact: takes the secrets out of errors.
        redact_value: takes those out of what the model reads that must not be there.
    """
    answer = json.loads(body)
    if "value" in answer:
        value, omitted = answer["value"], answer.get("omitted", 0)
        if isinstance(value, str):
            raw, limit = value.encode("utf-8", "replace"), frames.RESULT_BYTES
            if len(raw) > limit:  # the worker has cut it; a worker is not trusted
                value, omitted = raw[:limit].decode("utf-8", "ignore"), omitted + len(raw) - limit
            value = redact_value(value)
        return CallOutcome(status="ok", value=value, omitted=omitted)
    if "bad" in answer:
        return CallOutcome(status="invalid", error=redact(answer["bad"]))
    if "error" in answer:
        return _raised(answer["error"], redact, file, elsewhere=elsewhere)
    if answer.get("fault") == "timeout":
        return CallOutcome(status="timeout", error=f"took longer than {timeout:g} s")
    return CallOutcome(status="died", error=redact(_ending(answer, file.name)))


def _raised(
    error: Mapping[str, str], redact: Redactor, file: Path, *, elsewhere: bool
) -> CallOutcome:
    """One line: kind and message."""
    fix = error.get("fix")
    if module := error.get("module"):
        fix = fix_missing(module, file, elsewhere=elsewhere)
    text = escape(" ".join(redact(error["message"]).split()))[:_MAX_ERROR]
    return CallOutcome(
        status="raised",
        error=f"{error['type']}: {text}" if text else error["type"],
        place=error.get("place"),
        fix=escape(" ".join(redact(fix).split())) if fix else None,
        detail=redact(error.get("traceback") or "") or None,
        passing=bool(error.get("passing")),
    )


def _ending(answer: Fault, file: str) -> str:
    fault, why = answer.get("fault"), escape(str(answer.get("why")))
    if fault == "died":
        return f"its process ended ({how_it_ended(answer.get('status'))})"
    if fault == "processes":
        return f"started more than {answer['limit']} processes"
    if fault == "blocked":
        return "was ended with its process, which another call had blocked"
    if fault == "worn":
        return "was ended with its process, in which too many timed-out calls went on"
    if fault == "start":
        return f"a process of {file} could not be started: {why}"[:_MAX_ERROR]
    return f"the process of {file} failed: {why}"


async def call_function(
    info: FunctionInfo,
    given: Mapping[str, object],
    context: ToolContext,
    *,
    host: CodeHost,
    sandboxes: Sandboxes | None,
    timeout: float,
) -> CallOutcome:
    """``CodeHost.call`` where ``info`` has to run: with ``sandbox=True`` in the sandbox of the rollout, else in ``host``. Starting
    a container does not count against ``timeout``; one that died is replaced.

    Args:
        given: what the payload holds besides what comes from ``context``.
        context: of the rollout; one ``rollout_id`` has one container.

    Raises:
        RuntimeError: ``info`` wants a sandbox and ``sandboxes`` is None.
        KeyError: there is no such function.
        InputError, TemporaryError: as ``Sandboxes.host``.
    """
    metadata, variables = dict(context.metadata), dict(context.variables)
    payload = {**given, "metadata": metadata, "variables": variables, "episode": context.episode}
    if not info.sandbox:
        return await host.call(info.name, payload, timeout=timeout)
    if sandboxes is None:  # never silently on this machine
        raise RuntimeError(f"{info.name} has sandbox=True and there is no sandbox")
    inside = await sandboxes.host(host, context)
    try:
        return await inside.call(info.name, payload, timeout=timeout)
    except StartFailed:
        if sandboxes.runs(context):
            raise
    inside = await sandboxes.host(host, context)
    return await inside.call(info.name, payload, timeout=timeout)
