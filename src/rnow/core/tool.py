"""The ``@tool`` decorator. It marks a function and leaves it callable as it was written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar, cast, overload

__all__ = ["ToolArgs", "ToolSpec", "tool"]

_MARK = "__rnow_tool__"
_collected: ContextVar[list[ToolSpec] | None] = ContextVar("collected_tools", default=None)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class ToolArgs:
    """What a tool may know beside the model's arguments: the row's ``metadata`` and ``variables``.

    A tool that has a parameter ``args: ToolArgs`` is given it; the model never sees that parameter.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A decorated function and its options. ``timeout`` is in seconds; None = ``rollout.tool_timeout``."""

    name: str
    function: Callable[..., Any]
    sandbox: bool = False
    timeout: float | None = None

    @property
    def is_async(self) -> bool:
        """Whether the function is ``async def``."""
        return inspect.iscoroutinefunction(self.function)


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(*, sandbox: bool = False, timeout: float | None = None) -> Callable[[F], F]: ...


def tool(
    function: F | None = None, /, *, sandbox: bool = False, timeout: float | None = None
) -> F | Callable[[F], F]:
    """Mark a function, sync or async, as a tool that the student may call by the function's name.

    The docstring tells the model what it does; the type hints become the JSON schema of its arguments. What is missing or
    cannot be expressed is reported when the project is loaded.

    Args:
        sandbox: run it in a container.
        timeout: seconds for one call; it wins over ``rollout.tool_timeout``.

    Raises:
        TypeError: when it does not decorate a function, or an option has the wrong type.
    """
    if not isinstance(sandbox, bool):
        raise TypeError(f"@tool: sandbox must be True or False, not {sandbox!r}")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
    ):
        raise TypeError(f"@tool: timeout must be a positive number of seconds, not {timeout!r}")

    def mark(target: F) -> F:
        if not isinstance(target, FunctionType):
            raise TypeError(f"@tool decorates a function, not {type(target).__name__}")
        spec = ToolSpec(
            name=str(target.__name__),
            function=target,
            sandbox=sandbox,
            timeout=None if timeout is None else float(timeout),
        )
        setattr(target, _MARK, spec)
        collected = _collected.get()
        if collected is not None:
            collected.append(spec)
        return cast(F, target)

    return mark if function is None else mark(function)


def tool_spec(value: object) -> ToolSpec | None:
    """The options of a decorated function, or None for anything else."""
    if not inspect.isfunction(value):
        return None
    spec = getattr(value, _MARK, None)
    # functools.wraps copies the mark onto a wrapper, which is then a different function.
    return spec if isinstance(spec, ToolSpec) and spec.function is value else None


@contextmanager
def collect_tools() -> Iterator[list[ToolSpec]]:
    """A list that receives every tool decorated while it is open."""
    collected: list[ToolSpec] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
