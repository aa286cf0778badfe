"""One container: started with a keeper as its first process, entered with ``exec``, gone when it or its owner ends."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rnow.errors import InputError, TemporaryError
from rnow.processes.process import ManagedProcess
from rnow.usercode import keeper
from rnow.usercode.engines import ContainerEngine
from rnow.usercode.visible import PACKAGE, check_project, hidden_in

OWNER = "rnow.owner"
"""The label that says whose a container is: machine start, process namespace, process, its start."""

MIN_PYTHON = (3, 11)
MEMORY_GB, PROCESSES, CPUS = 8.0, 1024, 2.0
_KEEPER = Path(keeper.__file__)
_REMOVE_SECONDS = 30.0
_END_SECONDS = 2.0
_NO_PROGRAM = (125, 126, 127)


def limit_arguments() -> list[str]:
    """What one container may take (no swap, and at most the CPUs that there are), for ``run``."""
    memory = f"{int(MEMORY_GB * 1024)}m"
    return [
        *("--memory", memory, "--memory-swap", memory),
        *("--pids-limit", str(PROCESSES)),
        *("--cpus", f"{min(CPUS, os.cpu_count() or 1):g}"),
    ]


def mount_arguments(folder: Path, *, empty: Path, nothing: Path) -> list[str]:
    """For ``run``: the project and rnow's source, read-only and under their own paths; without ``.env`` and earlier runs.
    ``empty`` and ``nothing`` are an empty file and folder, shown in place of what is hidden.

    Raises InputError for a project that is a home folder.
    """
    check_project(folder)
    hidden = hidden_in([folder], [folder])
    mounts = [_bind(path, path) for path in (PACKAGE, folder)]
    mounts += [_bind(empty, path) for path in hidden.files]
    mounts += [_bind(nothing, path) for path in hidden.folders]
    return [part for mount in mounts for part in ("--mount", mount)]


class Container:
    """A running container. ``name`` is what the engine calls it; ``arguments`` are its mounts and limits."""

    def __init__(
        self,
        engine: ContainerEngine,
        image: str,
        *,
        file: Path,
        arguments: Sequence[str],
        log: Path,
    ) -> None:
        self.name = f"rnow-{secrets.token_hex(8)}"
        self.image = image
        self._engine = engine
        self._file = file
        self._lock = threading.Lock()
        self._ours: socket.socket | None = None
        self._command = [engine.path, *self._run_arguments(arguments)]
        self._log = log
        self._process: ManagedProcess | None = None

    def _run_arguments(self, arguments: Sequence[str]) -> list[str]:
        # Where SELinux guards files, a container may not read the user's; relabelling those would be worse.
        relaxed = ["--security-opt", "label=disable"] if Path("/sys/fs/selinux/enforce").exists() else []  # fmt: skip
        return [
            *("run", "--rm", "--interactive", "--pull", "never"),
            *("--name", self.name, "--label", f"{OWNER}={owner()}"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", *relaxed),
            *arguments,
            *("--entrypoint", "python3", self.image),
            *("-I", "-S", str(_KEEPER), str(self._file)),
        ]

    def start(self, *, timeout: float, where: str | None = None) -> None:
        """Start it and wait until it can be entered. Blocks.

        Raises:
            InputError: the image has no Python, an old one, or one that cannot read the project.
            ContainerFailed: the engine did not start it.
        """
        ours, theirs = socket.socketpair()
        process = ManagedProcess(
            self._command,
            log=self._log,
            name=f"a container of {self.image}",
            stdio=theirs.fileno(),
        )
        self._ours, self._process = ours, process
        try:
            with theirs:
                process.start()
            said = _line(ours, process.alive, timeout)
            if said is None:
                raise self._not_started(process, where)
            try:
                report = json.loads(said.partition(b"\n")[0])
            except ValueError:
                raise self._not_started(process, where) from None
            self._check(report, where)
        except BaseException:
            self.remove()
            raise

    def _check(self, report: Mapping[str, object], where: str | None) -> None:
        version = report["version"]
        assert isinstance(version, list)
        if tuple(version[:2]) < MIN_PYTHON:
            raise InputError(
                f'the image "{self.image}" has Python {version[0]}.{version[1]}; sandboxed functions need '
                f"{MIN_PYTHON[0]}.{MIN_PYTHON[1]}",
                title="Unusable image",
                where=where,
                fix="name an image with a newer python3, or install one in its Dockerfile",
            )
        if report["problem"]:
            raise InputError(
                f'{self._file.name} cannot be read inside "{self.image}": {report["problem"]}',
                title="Unusable image",
                where=where,
                why="a container runs as another user, without the rights of root",
                fix=f"chmod -R go+rX {self._file.parent}",
            )

    def _not_started(self, process: ManagedProcess, where: str | None) -> Exception:
        deadline = time.monotonic() + _END_SECONDS
        while process.alive() and time.monotonic() < deadline:  # it may just have closed its output
            time.sleep(0.02)
        code, tail = process.exit_code(), process.log_tail(8)
        text = "\n".join(tail)
        if (
            code in _NO_PROGRAM
            and "python3" in text
            and ("not found" in text or "no such file" in text.lower())
        ):
            return InputError(
                f'the image "{self.image}" has no python3, with which sandboxed functions run',
                title="Unusable image",
                where=where,
                fix=f"name an image with Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer, or install one in its Dockerfile",
            )
        ending = "did not answer in time" if code is None else f"ended with exit code {code}"
        return ContainerFailed(
            f'a container of "{self.image}" {ending}',
            details=tail,
            where=where,
            fix=f"see {self._log}; is {self._engine.name} well?",
        )

    def wrap(self, command: list[str]) -> list[str]:
        """The command that runs ``command`` (of this Python) inside."""
        inside = ["python3" if part == sys.executable else part for part in command]
        return self._engine.command("exec", "--interactive", self.name, *inside)

    def alive(self) -> bool:
        """Whether it runs."""
        return self._ours is not None and self._process is not None and self._process.alive()

    def remove(self) -> None:
        """End and remove it, whatever runs inside; idempotent. Blocks."""
        with self._lock:
            ours, self._ours = self._ours, None
            if ours is None or self._process is None:
                return
            ours.close()
            self._engine.ask("rm", "--force", self.name, timeout=_REMOVE_SECONDS)
            self._process.stop()


class ContainerFailed(TemporaryError):
    """The engine could not start a container."""


def _line(ours: socket.socket, alive: Callable[[], bool], timeout: float) -> bytes | None:
    """The first line that comes, None when it does not."""
    deadline = time.monotonic() + timeout
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([ours], [], [], min(left, 0.5))[0]:
            data = ours.recv(4096)
            said += data
            if not data:
                return None
            if b"\n" in said:
                return said
        elif not alive():
            return None
    return None


def owner() -> str:
    """This process, told apart from every other of this machine since it was started."""
    return f"{_here()}/{os.getpid()}/{_started(os.getpid())}"


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def abandoned(label: str) -> bool:
    """Whether this owner is known to be gone. One on another machine, or seen from inside another container, is not."""
    here, _, rest = label.rpartition("/")[0].rpartition("/")
    started = label.rpartition("/")[2]
    if here != _here() or not rest.isdigit():
        return False
    return str(_started(int(rest))) != started


def sweep(engine: ContainerEngine) -> list[str]:
    """Remove the containers of owners that are gone, however they went. Returns their ids."""
    found = engine.ask("ps", "--all", "--quiet", "--filter", f"label={OWNER}")
    removed = []
    for container in found.text.split() if found.ok else ():
        label = engine.ask(
            "inspect", "--format", f'{{{{index .Config.Labels "{OWNER}"}}}}', container
        )
        if label.ok and abandoned(label.text.strip()):
            engine.ask("rm", "--force", container, timeout=_REMOVE_SECONDS)
            removed.append(container)
    return removed


def _bind(source: Path, target: Path) -> str:
    """``--mount`` takes a line of CSV, so a path may hold commas."""
    fields = ("type=bind", f"source={source}", f"destination={target}", "readonly")
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()
