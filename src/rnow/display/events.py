"""The display for programs: what happens, as a mapping for each event. docs/how-to/runs.md has their names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rnow.display.downloads import Download
from rnow.display.plain_lines import STEP_STAGES
from rnow.errors import EXIT_FAILED, EXIT_INTERRUPTED, RnowError, StopRequested

SECONDS_BETWEEN_DOWNLOADS = 1.0


class Events:
    """Tells each event to ``write`` as ``{"event": name, "time": seconds since 1970, ...}``, JSON-ready but for numbers that are
    not finite.

    Args:
        more: what every event says beside its own, e.g. which of several students it is about.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, object]], None],
        *,
        clock: Callable[[], float] = time.time,
        more: Mapping[str, object] | None = None,
    ) -> None:
        self._write = write
        self._clock = clock
        self._more = dict(more or {})
        self._stage = ""
        self._downloads: dict[str, float] = {}

    def tell(self, event: str, **values: object) -> None:
        """One event."""
        self._write({"event": event, "time": round(self._clock(), 3), **self._more, **values})

    def start(self, plan_lines: Sequence[str]) -> None:
        labelled = (line.partition(": ") for line in plan_lines)
        self.tell("plan", plan={label: value for label, _, value in labelled})

    def stage(self, name: str) -> None:
        if name != self._stage and name not in STEP_STAGES:
            self.tell("stage", stage=name)
        self._stage = name

    def download(self, download: Download) -> None:
        now = self._clock()
        whole = download.done >= download.total
        last = self._downloads.get(download.name)
        if not whole and last is not None and now - last < SECONDS_BETWEEN_DOWNLOADS:
            return
        self._downloads[download.name] = now
        self.tell(
            "download",
            model=download.name,
            bytes=download.done,
            total=download.total,
            seconds_left=0.0 if whole else download.seconds_left,
        )

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.tell("step", step=step, steps=total, metrics=dict(metrics))

    def note(self, text: str) -> None:
        self.tell("note", text=text)

    def warn(self, text: str) -> None:
        self.tell("warning", text=text)

    def evaluation(self, name: str, results: Mapping[str, float]) -> None:
        self.tell("evaluation", name=name, metrics=dict(results))

    def saved(self, step: int, folder: str) -> None:
        self.tell("saved", step=step, checkpoint=folder)

    def finish(self, lines: Sequence[str]) -> None:
        """Nothing: ``finished`` has the whole summary."""

    def close(self) -> None:
        """Nothing is held open."""

    def finished(self, summary: Mapping[str, object]) -> None:
        """The run is done; ``summary`` is the content of its summary.json."""
        self.tell("finished", exit_code=0, summary=dict(summary))

    def ended(self, error: BaseException) -> None:
        """The run ends with an error: ``stopped`` where somebody asked for it and the state is saved, else ``failed``."""
        if isinstance(error, RnowError):
            name = "stopped" if isinstance(error, StopRequested) else "failed"
            self.tell(
                name,
                exit_code=error.exit_code,
                title=error.title,
                message=error.message,
                where=error.where,
                why=error.why,
                fix=error.fix,
                details=[*error.details, *error.more],
            )
        elif isinstance(error, KeyboardInterrupt):
            self.tell("stopped", exit_code=EXIT_INTERRUPTED, title="Stopped", message="interrupted")
        else:
            message = f"{type(error).__name__}: {error}"
            self.tell(
                "failed", exit_code=EXIT_FAILED, title="A fault in rnow itself", message=message
            )
