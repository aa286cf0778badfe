"""The functions of tools.py as tools: they run in the processes of a ``CodeHost``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from rnow.protocols import Tool
from rnow.tools.limits import CutResult
from rnow.types import ToolContext, ToolResult
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CodeHost, call_function
from rnow.usercode.sandbox import Sandboxes

STARTING = 100.0
STARTING_SANDBOXED = 300.0
"""Seconds that may pass besides before a call begins: the host, or a worker of it, imports the file anew; a container starts."""


class HostTool:
    """One function. The decorator's timeout wins over ``default_timeout`` (``rollout.tool_timeout``), in seconds.

    One with ``sandbox=True`` runs in the sandbox of the rollout that calls; without ``sandboxes`` it can be listed, not called.
    """

    def __init__(
        self,
        info: FunctionInfo,
        host: CodeHost,
        default_timeout: float,
        sandboxes: Sandboxes | None,
    ) -> None:
        self.info = info
        self.name = info.name
        self.description = info.description
        self.parameters = info.parameters
        self.timeout = default_timeout if info.timeout is None else info.timeout
        self.starting = STARTING_SANDBOXED if info.sandbox else STARTING
        self._host = host
        self._sandboxes = sandboxes

    async def call(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        outcome = await call_function(
            self.info,
            {"arguments": dict(arguments)},
            context,
            host=self._host,
            sandboxes=self._sandboxes,
            timeout=self.timeout,
        )
        if outcome.status == "ok":
            text = "" if outcome.value is None else str(outcome.value)
            return CutResult(content=text, omitted=outcome.omitted)
        error = outcome.error or f"{self.name} failed ({outcome.status})"
        detail = "\n".join(filter(None, (outcome.detail, outcome.fix and f"fix: {outcome.fix}")))
        return ToolResult(content=f"Error: {error}", failed=True, detail=detail or None)


class HostTools:
    """All functions of a host: a source of ``rnow.tools.toolbox.Toolbox``, which starts and closes the host with it."""

    label = "tools.py"

    def __init__(
        self, host: CodeHost, default_timeout: float, *, sandboxes: Sandboxes | None = None
    ) -> None:
        self._host = host
        self._default_timeout = default_timeout
        self._sandboxes = sandboxes

    async def open(self) -> Sequence[Tool]:
        await asyncio.to_thread(self._host.start)
        return [
            HostTool(info, self._host, self._default_timeout, self._sandboxes)
            for info in self._host.functions
        ]

    async def close(self) -> None:
        self._host.close()  # here: it belongs to this loop
