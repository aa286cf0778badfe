"""The ``@tool`` decorator. It marks a function and leaves it callable as it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from rnow.core.marks import Marks

__all__ = ["ToolArgs", "tool"]

F = TypeVar("F", bound=Callable[..., object])


@dataclass(slots=True)
class ToolArgs:
    """What a tool may know beside the model's arguments: the row's ``metadata`` and ``variables``, and ``rollout_id``, a text of
    letters and digits that all calls of one rollout have in common and no other rollout has, of any step or run.

    A tool that has a parameter ``args: ToolArgs`` is given it; the model never sees that parameter.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    rollout_id: str = ""


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
    return TOOLS.mark(function, flags={"sandbox": sandbox}, timeout=timeout)


TOOLS = Marks("tool")
