"""The functions of tools.py as tools: they run in the processes of a ``CodeHost``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rnow.protocols import Tool
from rnow.tools.limits import CutResult
from rnow.types import ToolContext, ToolResult


class Function(Protocol):
    """What is used of ``rnow.usercode.functions.FunctionInfo``."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...
    @property
    def timeout(self) -> float | None: ...
    @property
    def sandbox(self) -> bool: ...


class Outcome(Protocol):
    """What is used of ``rnow.usercode.host.CallOutcome``."""

    @property
    def status(self) -> str: ...
    @property
    def value(self) -> str | float | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def detail(self) -> str | None: ...
    @property
    def omitted(self) -> int: ...


class Host(Protocol):
    """What is used of ``rnow.usercode.host.CodeHost``."""

    @property
    def functions(self) -> Sequence[Any]: ...
    def start(self) -> None: ...
    async def call(self, name: str, payload: Mapping[str, Any], *, timeout: float) -> Any: ...
    def close(self) -> None: ...


class Sandboxed(Protocol):
    """What is used of ``rnow.usercode.sandbox.SandboxedHosts``."""

    async def call(
        self,
        name: str,
        payload: Mapping[str, Any],
        *,
        timeout: float,
        rollout_id: str,
        docker: str | None = None,
        docker_env: Mapping[str, str] | None = None,
    ) -> Any: ...


class HostTool:
    """One function. The decorator's timeout wins over ``default_timeout`` (``rollout.tool_timeout``), in seconds.

    ``starting`` is what may pass besides before a call begins: the host, or a worker of it, imports the file anew.
    """

    starting = 100.0

    def __init__(self, info: Any, host: Host, default_timeout: float) -> None:
        self.info = info
        self._host = host
        self.timeout = default_timeout if info.timeout is None else info.timeout

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def description(self) -> str:
        return self.info.description

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.info.parameters

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        payload = {
            "arguments": dict(arguments),
            "metadata": dict(context.metadata),
            "variables": dict(context.variables),
        }
        outcome: Outcome = await self._ask(payload, context)
        if outcome.status == "ok":
            text = "" if outcome.value is None else str(outcome.value)
            return CutResult(content=text, omitted=outcome.omitted)
        error = outcome.error or f"{self.name} failed ({outcome.status})"
        return ToolResult(content=f"Error: {error}", failed=True, detail=outcome.detail)

    async def _ask(self, payload: Mapping[str, Any], context: ToolContext) -> Any:
        return await self._host.call(self.name, payload, timeout=self.timeout)


class SandboxedTool(HostTool):
    """One function with ``sandbox=True``: it runs in the sandbox of the rollout that calls, whose container may have to start."""

    starting = 300.0

    def __init__(self, info: Any, host: Host, default_timeout: float, sandboxed: Sandboxed) -> None:
        super().__init__(info, host, default_timeout)
        self._sandboxed = sandboxed

    async def _ask(self, payload: Mapping[str, Any], context: ToolContext) -> Any:
        return await self._sandboxed.call(
            self.name,
            payload,
            timeout=self.timeout,
            rollout_id=context.rollout_id,
            docker=context.docker,
            docker_env=context.docker_env,
        )


class HostTools:
    """All functions of a host: a source of ``rnow.tools.toolbox.Toolbox``, which starts and closes the host with it.

    ``sandboxed`` runs those with ``sandbox=True``; without it they can be listed, not called.
    """

    def __init__(
        self,
        host: Host,
        default_timeout: float,
        *,
        sandboxed: Sandboxed | None = None,
        label: str = "tools.py",
    ) -> None:
        self._host = host
        self._default_timeout = default_timeout
        self._sandboxed = sandboxed
        self._label = label

    @property
    def label(self) -> str:
        return self._label

    async def open(self) -> Sequence[Tool]:
        await asyncio.to_thread(self._host.start)
        return [self._tool(info) for info in self._host.functions]

    def _tool(self, info: Any) -> Tool:
        if not info.sandbox:
            return HostTool(info, self._host, self._default_timeout)
        sandboxed = self._sandboxed or _Listed()
        return SandboxedTool(info, self._host, self._default_timeout, sandboxed)

    async def close(self) -> None:
        self._host.close()  # here: it belongs to this loop


class _Listed:
    """In place of sandboxes that nobody has made: never silently on this machine."""

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError(f"{name} has sandbox=True and there is no sandbox")
