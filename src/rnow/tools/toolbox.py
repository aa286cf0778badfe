"""All tools of a run behind one door: which there are, and what the student reads after a call."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from rnow import progress
from rnow.errors import InputError, RnowError
from rnow.protocols import Tool
from rnow.rollout.rendering import ToolDescription, describe_tools
from rnow.text.redact import Redactor
from rnow.text.suggest import closest, did_you_mean
from rnow.tools.arguments import ArgumentChecker, SchemaProblem
from rnow.tools.limits import MAX_BYTES, CutResult, TokenLimit, keep_end, shorten, storable
from rnow.tools.patience import ended_within
from rnow.types import ToolCall, ToolContext, ToolResult

_DETAIL_CHARACTERS = 32_000
_ERROR_CHARACTERS = 500
_NAMES_SHOWN = 30
_MAX_CALLS = 64
_GRACE = 10.0  # seconds


class ToolSource(Protocol):
    """Where tools come from and what keeps them alive: a server, or a process that runs the user's functions."""

    @property
    def label(self) -> str:
        """The source in a message: ``tools.py``, or the address of a server."""
        ...

    async def open(self) -> Sequence[Tool]:
        """Bring it up and say what it has. May be called again after ``close``, in another event loop too."""
        ...

    async def close(self) -> None:
        """Let go of it; idempotent."""
        ...


class Toolbox:
    """The tools of a run.

    Args:
        sources: opened by ``open``; their tools keep this order.
        tokens: the longest result in tokens (``rollout.max_tool_response``); None: only ``MAX_BYTES`` counts.
        redact: takes the secrets out of everything that the student reads: descriptions and results.
        timeout: seconds for a tool that names no ``timeout`` of its own. Tools hold to their limits themselves, and may wait
            for a free process besides; the toolbox steps in after three times the limit, ten seconds, and what the tool says
            that it may need to come up (``starting``). Time in which the event loop was blocked does not count.

    At most 64 calls run at once; others wait their turn, outside their own time limit.

    >>> async with Toolbox(sources) as toolbox:  # doctest: +SKIP
    ...     result = await toolbox.run(call, context)
    """

    def __init__(
        self,
        sources: Sequence[ToolSource],
        *,
        tokens: TokenLimit | None = None,
        redact: Redactor | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._sources = tuple(sources)
        self._tokens = tokens
        self._redact = redact or Redactor()
        self._timeout = timeout
        self._tools: dict[str, Tool] = {}
        self._checkers: dict[str, ArgumentChecker] = {}
        self._turns: asyncio.Semaphore | None = None

    async def open(self) -> None:
        """Bring every source up, all at once.

        Raises:
            InputError: a source is not there, two tools share a name, or a tool's schema is not usable. Everything that was
                opened is closed again.
        """
        self._turns = asyncio.Semaphore(_MAX_CALLS)
        try:
            opening = [asyncio.ensure_future(source.open()) for source in self._sources]
            try:
                found = await asyncio.gather(*opening)
            finally:
                for task in opening:
                    task.cancel()
                await asyncio.gather(*opening, return_exceptions=True)
            origins: dict[str, str] = {}
            for source, tools in zip(self._sources, found, strict=True):
                for tool in tools:
                    self._take(tool, source.label, origins)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of every source; idempotent."""
        self._tools, self._checkers = {}, {}
        await asyncio.gather(*(source.close() for source in self._sources), return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """All tools, in the order that ``schemas`` keeps. Empty before ``open``."""
        return tuple(self._tools.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tools, in that order."""
        return tuple(self._tools)

    def schemas(self, allowed: Sequence[str] | None = None) -> list[ToolDescription]:
        """The tools as chat templates take them, always in the same order, whatever the order of ``allowed``.

        Raises:
            InputError: ``allowed`` names a tool that there is not.
        """
        for name in allowed or ():
            if name not in self._tools:
                raise InputError(
                    f"there is no tool {name!r}",
                    title="Unknown tool",
                    fix=_hint(name, self.names) or "remove it from the row's tools",
                )
        shown = [tool for tool in self.tools if allowed is None or tool.name in allowed]
        return self._redact.data(list(describe_tools(shown)))

    async def run(
        self, call: ToolCall, context: ToolContext, allowed: Sequence[str] | None = None
    ) -> ToolResult:
        """Run one call of the student.

        What the student or the tool did wrong is in the result, ``failed``: a call that could not be read, a tool that it does
        not have (``allowed``: those of the row; None: all), arguments that do not fit, a tool that raised or took too long.
        The result is storable, without secrets, and within the limits.

        Raises:
            RnowError: as the tool raised it: a fault of ours.
            asyncio.CancelledError: the caller was cancelled.
        """
        return self._fit(await self._answer(call, context, allowed))

    async def _answer(
        self, call: ToolCall, context: ToolContext, allowed: Sequence[str] | None
    ) -> ToolResult:
        if call.error is not None:
            return _failed(call.error)
        names = [name for name in self._tools if allowed is None or name in allowed]
        if call.name not in names:
            return _failed(f"there is no tool {call.name[:100]!r}. {_hint(call.name, names)}")
        tool = self._tools[call.name]
        arguments = self._checkers[call.name].check(call.arguments)
        if isinstance(arguments, str):
            return _failed(f"{call.name} was not called: {arguments}")
        if self._turns is None:
            raise RuntimeError("the toolbox is not open")
        async with self._turns:
            return await self._call(tool, arguments, context)

    async def _call(
        self, tool: Tool, arguments: Mapping[str, object], context: ToolContext
    ) -> ToolResult:
        limit = tool.timeout or self._timeout
        patience = 3 * limit + _GRACE + tool.starting

        async def called() -> ToolResult:
            return await tool.call(arguments, context)

        progress.moved(ahead=patience)
        task = asyncio.create_task(called())
        if not await ended_within(task, patience):
            return _failed(f"{tool.name} took much longer than {limit:g} s and was given up")
        if task.cancelled():
            return _failed(f"{tool.name} was interrupted")  # by itself: nobody cancelled us
        error = task.exception()
        if error is None:
            result = task.result()
            if isinstance(result, ToolResult) and isinstance(result.content, str):
                return result
            return _failed(f"{tool.name} gave no result", repr(result)[:_ERROR_CHARACTERS])
        if isinstance(error, RnowError) or not isinstance(error, Exception):
            raise error
        trace = "".join(traceback.format_exception(error))
        return _failed(f"{type(error).__name__}: {error}", trace)

    def _take(self, tool: Tool, label: str, origins: dict[str, str]) -> None:
        if tool.name in origins:
            raise InputError(
                f"two tools are named {tool.name!r}",
                title="Tool names clash",
                details=(f"one is from {origins[tool.name]}", f"the other is from {label}"),
                why="the student calls a tool by its name alone",
                fix="rename one of them, or do without one of the two",
            )
        origins[tool.name] = label
        try:
            self._checkers[tool.name] = ArgumentChecker(tool.parameters)
        except SchemaProblem as problem:
            raise InputError(
                f"the schema of the tool {tool.name!r} cannot be used: {problem}",
                title="Unusable tool",
                where=label,
            ) from None
        self._tools[tool.name] = tool

    def _fit(self, result: ToolResult) -> ToolResult:
        # Secrets first: a cut could leave half of one.
        content = self._redact(storable(result.content))
        detail = result.detail
        if detail is not None:
            detail = keep_end(self._redact(storable(str(detail))), _DETAIL_CHARACTERS)
        omitted = result.omitted if isinstance(result, CutResult) else 0
        content = shorten(content, max_bytes=MAX_BYTES, tokens=self._tokens, omitted=omitted)
        return ToolResult(content=content, failed=result.failed, detail=detail)


def _failed(message: str, detail: str | None = None) -> ToolResult:
    """A failure as the student reads it: one line."""
    line = " ".join(message.split())
    if len(line) > _ERROR_CHARACTERS:
        line = f"{line[:_ERROR_CHARACTERS]}..."
    return ToolResult(content=f"Error: {line}", failed=True, detail=detail)


def _hint(name: str, known: Sequence[str]) -> str:
    if not known:
        return "There are no tools."
    near = closest(name, known)
    meant = did_you_mean(near).replace("did", "Did", 1) + " " if near else ""
    more = ", ..." if len(known) > _NAMES_SHOWN else ""
    return f"{meant}Tools: {', '.join(known[:_NAMES_SHOWN])}{more}"
