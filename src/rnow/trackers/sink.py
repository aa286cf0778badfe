"""A run's trackers as one sink: each in a thread of its own, behind a bounded queue.

Whatever a tracker does (fails, hangs, is not installed) costs the run nothing but one warning. The run's files are the truth: at
every start each tracker is told what they hold, so that nothing is lost by a tracker that was away.
"""

from __future__ import annotations

import queue
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Warn
from rnow.display.terminal import one_line
from rnow.text.install import install_command
from rnow.text.redact import Redactor, without_user_info
from rnow.trackers.records import (
    History,
    Record,
    Tracker,
    evaluation_record,
    read_history,
    step_record,
)

MAX_UNSENT = 10_000
"""Records that may wait for a tracker."""

SILENT_SECONDS = 60.0
"""After so long without an answer to its first message the user is told of a tracker."""

_WHY_LETTERS = 300


class TrackerSink:
    """The trackers of one run; see ``disk.sinks.Sink``.

    Args:
        folder: whose files the trackers follow.
        warn: told once of each tracker that fails, in whichever thread that happens.
        redact: takes the secrets out of the names of metrics and evaluations, as it did in the files.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        folder: RunFolder,
        *,
        warn: Warn,
        redact: Redactor | None = None,
    ) -> None:
        self._folder = folder
        self._redact = redact or Redactor()
        again = f"`rnow track {shlex.quote(str(folder.path))}` sends it what is missing"
        self._workers = [_Worker(tracker, warn, again) for tracker in trackers]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.log``."""
        self._put(step_record(step, self._redact.data(dict(metrics), keys=True)))

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink.evaluated``."""
        shown = self._redact.data(dict(metrics), keys=True)
        self._put(evaluation_record(self._redact(name), step, shown))

    def forget_from(self, step: float) -> None:
        """See ``Sink.forget_from``. The files still hold what the run is about to forget."""
        self._put(read_history(self._folder, before=step))

    def close(self, patience: float) -> None:
        """See ``Sink.close``. The trackers finish at the same time."""
        for worker in self._workers:
            worker.end()
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()), patience)

    def _put(self, item: History | Record) -> None:
        for worker in self._workers:
            worker.put(item)


class _Worker:
    """The thread in which one tracker is spoken to: whatever does not come back there holds up nobody."""

    def __init__(self, tracker: Tracker, warn: Warn, again: str) -> None:
        self._tracker = tracker
        self._warn = warn
        self._again = again
        self._over = False
        self._silent_since: float | None = None
        self._waiting: queue.Queue[History | Record | None] = queue.Queue(MAX_UNSENT)
        self.thread = threading.Thread(target=self._work, name=tracker.extra, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:  # the system allows no more threads
            self._give_up("could not start", str(error))

    def put(self, item: History | Record) -> None:
        if self._over:
            return
        if isinstance(item, History):
            self._silent_since = time.monotonic()
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._give_up("stopped accepting metrics", f"{MAX_UNSENT} records are not sent")
            return
        since = self._silent_since
        if since is not None and time.monotonic() - since > SILENT_SECONDS:
            self._silent_since = None
            self._warn(
                f"{self._tracker.title} has not answered yet; training goes on, and its metrics wait"
            )

    def end(self) -> None:
        """Nothing more comes."""
        if not self._over:
            with suppress(queue.Full):
                self._waiting.put_nowait(None)

    def wait(self, seconds: float, patience: float) -> None:
        """Until everything is sent, but not longer than so many of the ``patience`` seconds that all trackers have."""
        if self._over:
            return
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._give_up("did not finish", f"no answer in {patience:g} s")
        self._over = True

    def _work(self) -> None:
        doing, begun = "could not start", False
        try:
            while (item := self._waiting.get()) is not None:
                if isinstance(item, History):
                    self._tracker.begin(item)
                    doing, begun, self._silent_since = "stopped accepting metrics", True, None
                else:
                    self._tracker.send(item)
                self._waiting.task_done()
            doing = "did not finish cleanly"
            if begun:
                self._tracker.finish()
        except ImportError as error:
            self._tell(_not_there(self._tracker, error))
        except BaseException as error:  # some libraries call sys.exit
            self._give_up(doing, str(error) or type(error).__name__)

    def _give_up(self, what: str, why: str) -> None:
        shown = one_line(without_user_info(why), _WHY_LETTERS)
        self._tell(
            f"{self._tracker.title} {what}: {shown} (training goes on without it; {self._again})"
        )

    def _tell(self, text: str) -> None:
        if not self._over:
            self._over = True
            self._warn(text)


def _not_there(tracker: Tracker, error: ImportError) -> str:
    """What to type for a package that is missing, or that misses one."""
    named = (error.name or "").partition(".")[0]
    missing = isinstance(error, ModuleNotFoundError) and named == tracker.extra
    why = "is not installed" if missing else f"cannot be loaded ({error})"
    return (
        f"{tracker.title} {why}, and training goes on without it: {install_command(tracker.extra)}"
    )
