"""Folders with user code, and what is needed to look at the processes that run it."""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rnow.usercode.functions import Kind
from rnow.usercode.host import CallOutcome, CodeHost

HEAD = "from rnow.core import tool, ToolArgs, reward, RewardArgs\n"


def write(folder: Path, code: str, name: str = "tools.py") -> Path:
    """Write ``code``, after the usual imports, as ``folder/name``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(HEAD + textwrap.dedent(code))
    return path


def make_host(folder: Path, code: str, kind: Kind = "tools", **options: Any) -> CodeHost:
    """A host of ``tools.py`` or ``rewards.py`` with this code."""
    return CodeHost(write(folder, code, f"{kind}.py"), kind, **options)


def call(host: CodeHost, name: str, *, timeout: float = 20.0, **arguments: Any) -> CallOutcome:
    """One call of a tool, in an event loop of its own."""
    return asyncio.run(host.call(name, {"arguments": arguments}, timeout=timeout))


def calls(host: CodeHost, *wanted: tuple[str, dict[str, Any], float]) -> list[CallOutcome]:
    """Calls at the same time: (name, arguments, timeout)."""

    async def all_of_them() -> list[CallOutcome]:
        return await asyncio.gather(
            *(
                host.call(name, {"arguments": arguments}, timeout=timeout)
                for name, arguments, timeout in wanted
            )
        )

    return asyncio.run(all_of_them())


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Fail unless it becomes true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def living(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def open_files() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
