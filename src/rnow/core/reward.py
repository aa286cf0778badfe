"""The ``@reward`` decorator. It marks a function and leaves it callable as it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from rnow.core.marks import Marks
from rnow.core.messages import get_response

__all__ = ["RewardArgs", "get_response", "reward"]

F = TypeVar("F", bound=Callable[..., object])


@dataclass(slots=True)
class RewardArgs:
    """The first argument of a reward: the row's ``metadata`` and ``variables``, and the project's secrets by name."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


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
    return REWARDS.mark(
        function, flags={"precondition": precondition, "sandbox": sandbox}, timeout=timeout
    )


REWARDS = Marks("reward")
