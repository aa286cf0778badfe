"""How long each stage of a step took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageClock:
    """Adds up seconds under the name of each stage.

    Args:
        on_start: told the name of each stage as it begins.
    """

    def __init__(self, on_start: Callable[[str], None] = lambda name: None) -> None:
        self._on_start = on_start
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block as ``time/<name>``."""
        self._on_start(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """``time/<stage>`` for each stage and ``time/step`` since the clock was made, in seconds."""
        stages = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return stages | {"time/step": time.perf_counter() - self._started}
