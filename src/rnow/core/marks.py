"""What ``@tool`` and ``@reward`` have in common: marking a function with its options, and finding the mark again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A decorated function and its options. ``timeout`` is in seconds; None = the config's."""

    name: str
    function: Callable[..., object]
    precondition: bool = False
    sandbox: bool = False
    timeout: float | None = None

    @property
    def is_async(self) -> bool:
        """Whether the function is ``async def``."""
        return inspect.iscoroutinefunction(self.function)


class Marks:
    """The marks of one decorator, whose name is given as in ``@tool``."""

    def __init__(self, decorator: str) -> None:
        self._decorator = decorator
        self._attribute = f"__rnow_{decorator}__"
        self._collected: ContextVar[list[Spec] | None] = ContextVar(f"{decorator}s", default=None)

    def mark(
        self, function: F | None, *, flags: Mapping[str, bool], timeout: float | None
    ) -> F | Callable[[F], F]:
        """What the decorator returns, with or without parentheses.

        Raises:
            TypeError: when it does not decorate a function, or an option has the wrong type.
        """
        for label, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"@{self._decorator}: {label} must be True or False, not {flag!r}")
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
        ):
            raise TypeError(
                f"@{self._decorator}: timeout must be a positive number of seconds, not {timeout!r}"
            )

        def mark(target: F) -> F:
            if not isinstance(target, FunctionType):
                kind = type(target).__name__
                raise TypeError(f"@{self._decorator} decorates a function, not {kind}")
            spec = Spec(
                name=str(target.__name__),
                function=target,
                timeout=None if timeout is None else float(timeout),
                **flags,
            )
            setattr(target, self._attribute, spec)
            collected = self._collected.get()
            if collected is not None:
                collected.append(spec)
            return cast(F, target)

        return mark if function is None else mark(function)

    def spec_of(self, value: object) -> Spec | None:
        """The options of a decorated function, or None for anything else."""
        if not inspect.isfunction(value):
            return None
        spec = getattr(value, self._attribute, None)
        # functools.wraps copies the mark onto a wrapper, which is then a different function.
        return spec if isinstance(spec, Spec) and spec.function is value else None

    @contextmanager
    def collect(self) -> Iterator[list[Spec]]:
        """A list that receives every function decorated while it is open."""
        collected: list[Spec] = []
        token = self._collected.set(collected)
        try:
            yield collected
        finally:
            self._collected.reset(token)
