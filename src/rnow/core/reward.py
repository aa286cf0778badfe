"""The ``@reward`` decorator. It marks a function and leaves it callable as it was written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar, cast, overload

from rnow.core.messages import get_response

__all__ = ["RewardArgs", "RewardSpec", "get_response", "reward"]

_MARK = "__rnow_reward__"
_collected: ContextVar[list[RewardSpec] | None] = ContextVar("collected_rewards", default=None)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class RewardArgs:
    """The first argument of a reward: the row's ``metadata`` and ``variables``, and the project's secrets by name."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A decorated function and its options. ``timeout`` is in seconds; None = ``rollout.reward_timeout``."""

    name: str
    function: Callable[..., Any]
    precondition: bool = False
    sandbox: bool = False
    timeout: float | None = None

    @property
    def is_async(self) -> bool:
        """Whether the function is ``async def``."""
        return inspect.iscoroutinefunction(self.function)


@overload
def reward(function: F, /) -> F: ...
@overload
def reward(
    *, precondition: bool = False, sandbox: bool = False, timeout: float | None = None
) -> Callable[[F], F]: ...


def reward(
    function: F | None = None,
    /,
    *,
    precondition: bool = False,
    sandbox: bool = False,
    timeout: float | None = None,
) -> F | Callable[[F], F]:
    """Mark ``def f(args: RewardArgs, messages: list) -> float``, sync or async, as a reward named ``f``.

    Args:
        precondition: a result of 0 makes the rollout's whole reward 0.
        sandbox: run it in a container.
        timeout: seconds for one call; it wins over ``rollout.reward_timeout``.

    Raises:
        TypeError: when it does not decorate a function, or an option has the wrong type.
    """
    for label, flag in (("precondition", precondition), ("sandbox", sandbox)):
        if not isinstance(flag, bool):
            raise TypeError(f"@reward: {label} must be True or False, not {flag!r}")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
    ):
        raise TypeError(f"@reward: timeout must be a positive number of seconds, not {timeout!r}")

    def mark(target: F) -> F:
        if not isinstance(target, FunctionType):
            raise TypeError(f"@reward decorates a function, not {type(target).__name__}")
        spec = RewardSpec(
            name=str(target.__name__),
            function=target,
            precondition=precondition,
            sandbox=sandbox,
            timeout=None if timeout is None else float(timeout),
        )
        setattr(target, _MARK, spec)
        collected = _collected.get()
        if collected is not None:
            collected.append(spec)
        return cast(F, target)

    return mark if function is None else mark(function)


def reward_spec(value: object) -> RewardSpec | None:
    """The options of a decorated function, or None for anything else."""
    if not inspect.isfunction(value):
        return None
    spec = getattr(value, _MARK, None)
    # functools.wraps copies the mark onto a wrapper, which is then a different function.
    return spec if isinstance(spec, RewardSpec) and spec.function is value else None


@contextmanager
def collect_rewards() -> Iterator[list[RewardSpec]]:
    """A list that receives every reward decorated while it is open."""
    collected: list[RewardSpec] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
