"""TensorBoard: an event file in the run's folder, written anew at every start from the run's own files.

An event cannot be taken out of a file, and what a kill left unwritten cannot be told from what was never logged: one new file is the
simple way to have every number once. TensorBoard keeps 32-bit floats.
"""

from __future__ import annotations

import os
import time
from typing import Any

from rnow.trackers.records import History, Record, Tracked

FOLDER = "tensorboard"
"""In the run's folder."""


class TensorBoardTracker:
    """The event file of one run."""

    title, extra = "TensorBoard", "tensorboard"

    def __init__(self, tracked: Tracked) -> None:
        self._folder = tracked.folder.path / FOLDER
        self._writer: Any = None

    def begin(self, history: History) -> None:
        """See ``Tracker.begin``."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

        earlier = list(self._folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(self._folder))
        # To one that is looking on it says: forget what you read before.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))
        for record in history.records:
            self._add(record)
        self._writer.flush()
        for path in earlier:
            # One that is looking on would stop at a file that is gone; an empty one it leaves for the next.
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()

    def send(self, record: Record) -> None:
        """See ``Tracker.send``. The numbers are in the file when it returns."""
        self._add(record)
        self._writer.flush()

    def finish(self) -> None:
        """See ``Tracker.finish``."""
        self._writer.close()

    def _add(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in record.values.items()
        ]
        event = Event(wall_time=time.time(), step=record.step, summary=Summary(value=values))
        self._writer.add_event(event)
