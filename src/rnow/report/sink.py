"""The page of a run, kept up to date while the run goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from rnow.disk.folder import RunFolder
from rnow.report.build import has_something, write_report

Warn = Callable[[str], None]

EVERY_SECONDS = 60.0
"""The least between two writings."""

SHARE = 0.01
"""Of the time at most so much goes into writing, however large the run is."""

MOST_SECONDS = 20.0
"""After so many no further transcript is looked at."""


class ReportSink:
    """A ``disk.sinks.Sink`` that writes ``report.html`` after a step, beside what the run does next, and once more at the end.

    Nothing that goes wrong there is the run's concern: it is told once, and the run goes on.

    Args:
        warn: told once when it cannot be written.
        clock: seconds, monotonic.
    """

    def __init__(
        self, folder: RunFolder, *, warn: Warn, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._warn = warn
        self._clock = clock
        self._due = clock() + EVERY_SECONDS
        self._thread: threading.Thread | None = None
        self._wrong: Exception | None = None
        self._told = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.log``. The step's own line is in its file already; its transcript may not be."""
        self._tell()
        if self._clock() >= self._due and not self._busy():
            self._begin()

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.evaluated``."""
        self.log(step, metrics)

    def forget_from(self, step: int) -> None:
        """See ``Sink.forget_from``. The next writing has what is left."""

    def close(self, patience: float) -> None:
        """See ``Sink.close``: the last writing, which has the end of the run."""
        until = self._clock() + patience
        if self._thread is not None:
            self._thread.join(patience)
        if not self._busy() and has_something(self._folder):
            self._begin()
            if self._thread is not None:
                self._thread.join(max(0.0, until - self._clock()))
        self._tell()

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system allows no more threads
            self._thread, self._wrong = None, error

    def _work(self) -> None:
        began = self._clock()
        try:
            write_report(self._folder, seconds=MOST_SECONDS)
        except Exception as error:
            self._wrong = error
        ended = self._clock()
        self._due = ended + max(EVERY_SECONDS, (ended - began) / SHARE)

    def _tell(self) -> None:
        if self._wrong is not None and not self._told:
            self._told = True
            self._warn(
                f"{self._folder.report.name} is not being written ({self._wrong}); the run goes on without it, and "
                f"`rnow report {self._folder.path.name}` makes it from what is kept"
            )
