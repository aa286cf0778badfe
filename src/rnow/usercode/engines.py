"""What this machine has to shut user code in: Docker, Podman, bubblewrap. Each is tried once, not only looked for."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

ASK_SECONDS = 20.0

ISOLATION = (
    "--unshare-user",
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
    "--new-session",
    "--die-with-parent",
    *("--cap-drop", "ALL"),
    *("--hostname", "sandbox"),
)
"""What bubblewrap takes away. All of it is needed: where one part is not allowed, bubblewrap is not used."""

_OPTIONAL = ("--size", "--disable-userns")
_SETTINGS = frozenset(
    [
        "DOCKER_API_VERSION",
        "DOCKER_CERT_PATH",
        "DOCKER_TLS",
        "DOCKER_TLS_VERIFY",
        "CONTAINERS_CONF",
        "CONTAINERS_CONF_OVERRIDE",
        "CONTAINERS_REGISTRIES_CONF",
        "CONTAINERS_STORAGE_CONF",
        "CONTAINER_CONNECTION",
        "CONTAINER_SSHKEY",
        "DBUS_SESSION_BUS_ADDRESS",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command said. ``code`` is None when it could not be run or took too long; ``text`` then says so."""

    code: int | None
    text: str

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.code == 0

    def last_lines(self) -> str:
        """The end of what it said, on one line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return " / ".join(lines[-5:])[-800:] or f"exit code {self.code}"


def ask(command: Sequence[str], *, timeout: float = ASK_SECONDS) -> Answer:
    """Run a command to its end, with nothing on stdin. Never raises for what it does."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(code=None, text=f"{command[0]} did not answer within {timeout:g} s")
    except OSError as error:
        return Answer(code=None, text=f"{command[0]}: {error.strerror}")
    said = done.stdout if done.returncode == 0 else done.stdout + b"\n" + done.stderr
    return Answer(code=done.returncode, text=said.decode("utf-8", "replace").strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerEngine:
    """A container engine that answered. ``name`` is ``docker`` or ``podman``, ``path`` its command."""

    name: str
    path: str

    def command(self, *arguments: str) -> list[str]:
        """A command line of it that works in a scrubbed environment too: what leads it to its engine comes along. These are
        addresses and paths, no secrets."""
        settings = [f"{name}={os.environ[name]}" for name in sorted(_SETTINGS & os.environ.keys())]
        return [*(["env", *settings] if settings else []), self.path, *arguments]

    def ask(self, *arguments: str, timeout: float = ASK_SECONDS) -> Answer:
        """Run one of its commands to its end."""
        return ask([self.path, *arguments], timeout=timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubblewrap:
    """A bubblewrap that may do all of ``ISOLATION`` here. ``options`` are those of its newer options that it has."""

    path: str
    options: frozenset[str] = frozenset()


def find_containers() -> ContainerEngine | str:
    """Docker, else Podman; or why neither can be used."""
    reasons = []
    for name in ("docker", "podman"):
        path = shutil.which(name)
        if path is None:
            continue
        problem = _engine_problem(name, path)
        if problem is None:
            return ContainerEngine(name=name, path=path)
        reasons.append(f"{name}: {problem}")
    return "; ".join(reasons) or "neither docker nor podman is installed"


def find_bubblewrap() -> Bubblewrap | str:
    """bubblewrap, or why it cannot be used."""
    path = shutil.which("bwrap")
    if path is None:
        return "bubblewrap (bwrap) is not installed"
    return _try_bubblewrap(path)


@functools.cache
def _engine_problem(name: str, path: str) -> str | None:
    # `docker version` fails without its daemon. Podman's only reads a file; `info` opens its storage.
    question = ("version", "--format", "{{.Server.Version}}") if name == "docker" else ("info",)
    answer = ask([path, *question])
    return None if answer.ok else answer.last_lines()


@functools.cache
def _try_bubblewrap(path: str) -> Bubblewrap | str:
    said = ask([path, "--help"])
    options = frozenset(option for option in _OPTIONAL if f"{option} " in f"{said.text} ")
    found = Bubblewrap(path=path, options=options)
    true = shutil.which("true") or "/bin/true"
    answer = ask([path, *isolation(found), "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--", true])  # fmt: skip
    if answer.ok:
        return found
    return f"bubblewrap is not allowed to isolate anything here: {answer.last_lines()}"


def isolation(bubblewrap: Bubblewrap) -> list[str]:
    """``ISOLATION``, and no further namespaces inside where this version can forbid them."""
    further = ["--disable-userns"] if "--disable-userns" in bubblewrap.options else []
    return [*ISOLATION, *further]


def forget() -> None:
    """Ask again at the next call. For tests."""
    _engine_problem.cache_clear()
    _try_bubblewrap.cache_clear()
