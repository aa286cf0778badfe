"""trackio: its local database, written anew at every start from the run's own files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from rnow.trackers.records import History, Record, Tracked

KEY = "rnow_run"
"""In trackio's config: which run it is, since another project may have one of the same name."""


class TrackioTracker:
    """One run in a project of trackio's database."""

    title, extra = "trackio", "trackio"

    def __init__(self, tracked: Tracked) -> None:
        self._tracked = tracked
        self._run: Any = None

    def begin(self, history: History) -> None:
        """See ``Tracker.begin``."""
        with _quiet():
            import trackio  # pyright: ignore[reportMissingImports]

            taken = self._delete_own(trackio)
            short = f"{self._tracked.name}-{self._tracked.id[:6]}"
            self._run = trackio.init(
                project=self._tracked.project,
                name=short if self._tracked.name in taken else self._tracked.name,
                config={**self._tracked.config, KEY: self._tracked.id},
                embed=False,
                auto_log_gpu=False,
            )
        for record in history.records:
            self.send(record)

    def send(self, record: Record) -> None:
        """See ``Tracker.send``."""
        self._run.log(dict(record.values), step=record.step)

    def finish(self) -> None:
        """See ``Tracker.finish``."""
        with _quiet():
            self._run.finish()

    def _delete_own(self, trackio: Any) -> set[str]:
        """Delete what an earlier start wrote. Gives the names of the others."""
        try:
            runs = list(trackio.Api().runs(self._tracked.project))
        except ValueError:  # there is no such project yet
            return set()
        others = set()
        for run in runs:
            if (run.config or {}).get(KEY) == self._tracked.id:
                run.delete()
            else:
                others.add(run.name)
        return others


@contextmanager
def _quiet() -> Iterator[None]:
    """trackio prints where it is, to a terminal that shows a table. rnow's own output does not go through these names."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
