"""A score that is still to be asked for, and one that was: ``llm_judge`` gives both, in async and in sync code."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Coroutine, Generator
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from rnow.core.judge_errors import JudgeError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_MAX_JUDGES = 256
"""Questions under way at once: as many as there are async rewards. One that waited for its turn here would lose the reward's time."""
_STACK_BYTES = 1 << 20
"""Of a thread that asks: the usual 8 MB each would take half of the memory that a process of rewards may have."""

_Term: TypeAlias = "float | Verdict"


def verdict(ask: Callable[[], float]) -> Any:
    """In an event loop the question, to be awaited; elsewhere its answer, a float.

    Args:
        ask: blocks until the score is there; called once, in a thread where there is a loop.
    """
    return Verdict(ask) if _in_event_loop() else Score(ask())


def _in_event_loop() -> bool:
    # Sync rewards have no need of asyncio, which takes longer to import than all of this package.
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Score(float):
    """The answer: a float that may be awaited as well, so that ``asyncio.run(llm_judge(...))`` works."""

    __slots__ = ()

    def send(self, value: object) -> NoReturn:
        """See ``collections.abc.Coroutine``: it is done at once."""
        raise StopIteration(float(self))

    def throw(self, error: BaseException) -> NoReturn:
        """See ``collections.abc.Coroutine``."""
        raise error

    def close(self) -> None:
        """See ``collections.abc.Coroutine``."""

    def __await__(self) -> Generator[Any, None, float]:
        return float(self)
        yield  # makes it a generator


class Verdict(Coroutine[Any, Any, float]):
    """The question: ``await`` it for the score. ``+ - * /`` with numbers and others of its kind give another one, so that a
    reward may return ``llm_judge(...) / 10``; whatever needs the number itself is an error that says so."""

    def __init__(self, ask: Callable[[], float]) -> None:
        self._ask = ask
        self._running: Coroutine[Any, Any, float] | None = None

    async def _asked(self) -> float:
        import asyncio
        import threading

        usual = threading.stack_size(_STACK_BYTES)
        try:
            asked = asyncio.get_running_loop().run_in_executor(_executor(), self._ask)
        finally:
            threading.stack_size(usual)
        return await asked

    def __await__(self) -> Generator[Any, None, float]:
        return self._asked().__await__()

    def send(self, value: object) -> Any:
        """See ``collections.abc.Coroutine``."""
        self._running = self._running or self._asked()
        return self._running.send(value)

    def throw(self, *error: Any) -> Any:
        """See ``collections.abc.Coroutine``."""
        self._running = self._running or self._asked()
        return self._running.throw(*error)

    def close(self) -> None:
        """See ``collections.abc.Coroutine``."""
        if self._running is not None:
            self._running.close()

    def __add__(self, other: _Term) -> Verdict:
        return _combined(self, other, operator.add)

    def __radd__(self, other: _Term) -> Verdict:
        return _combined(other, self, operator.add)

    def __sub__(self, other: _Term) -> Verdict:
        return _combined(self, other, operator.sub)

    def __rsub__(self, other: _Term) -> Verdict:
        return _combined(other, self, operator.sub)

    def __mul__(self, other: _Term) -> Verdict:
        return _combined(self, other, operator.mul)

    def __rmul__(self, other: _Term) -> Verdict:
        return _combined(other, self, operator.mul)

    def __truediv__(self, other: _Term) -> Verdict:
        return _combined(self, other, operator.truediv)

    def __rtruediv__(self, other: _Term) -> Verdict:
        return _combined(other, self, operator.truediv)

    def _not_there(self, *other: object) -> NoReturn:
        raise JudgeError("the judge was not asked yet: write `await llm_judge(...)`")

    __bool__ = __float__ = __int__ = __round__ = __abs__ = _not_there
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _not_there
    __hash__ = object.__hash__  # asyncio keeps it in sets


def _combined(left: _Term, right: _Term, combine: Callable[[float, float], float]) -> Verdict:
    return Verdict(lambda: combine(_number(left), _number(right)))


def _number(term: _Term) -> float:
    return term._ask() if isinstance(term, Verdict) else float(term)


@cache
def _executor() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    # asyncio's own pool has only a few threads on a small machine; judging is waiting, not computing.
    return ThreadPoolExecutor(_MAX_JUDGES, thread_name_prefix="judge")
