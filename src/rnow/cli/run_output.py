"""Where a run is shown: on the terminal, as events on standard output (``--json``), or its result alone (``--quiet``)."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rnow import __version__
from rnow.cli.faults import as_reported, report
from rnow.cli.options import placed
from rnow.cli.output import Outlet, console, print_lines, print_note, redacted, settle
from rnow.cli.several import exit_code, outcome_table, outcome_values, result_line
from rnow.disk.files import to_json
from rnow.display.display import Both, Display, Harmless, QuietDisplay, build_display
from rnow.display.events import Events

if TYPE_CHECKING:
    from rnow.config import Config, LoadedConfig
    from rnow.setup.facts import RunSummary
    from rnow.setup.several import Outcome


class RunOutput:
    """Told what becomes of one command `rnow run`, or of the runs of a study.

    Args:
        as_json: events on standard output, one JSON object per line, and nothing else there.
        quiet: no progress, notes or warnings.
        events: False where ``as_json`` means one document that the command prints at its end itself.
    """

    def __init__(self, *, as_json: bool, quiet: bool = False, events: bool = True) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._console = console(stderr=as_json, aside=True)
        told = as_json and events
        self._lines = Outlet(sys.stdout or io.StringIO(), aside=True) if told else None
        self._of_all = self._events()
        self._of_all.tell("start", rnow=__version__)

    @contextmanager
    def display(self, about: Mapping[str, object] | None = None) -> Iterator[Display]:
        """What one run tells, until the block ends. ``about``: says in every event which run it is, where there are several."""
        display: Display = QuietDisplay() if self._quiet else build_display(self._console)
        if self._lines is not None:
            display = Both(Harmless(self._events(about)), display)
        try:
            yield display
        finally:
            display.close()
            settle(self._console)

    def loaded(self, loaded: LoadedConfig) -> None:
        """The config was read; what there is to say of it was printed already."""
        for line in loaded.warnings:
            self._of_all.warn(line)
        for line in loaded.changes:
            self._of_all.note(line)

    def finished(
        self, summary: Mapping[str, object], about: Mapping[str, object] | None = None
    ) -> None:
        """A run is done. ``about``: as of ``display``."""
        self._events(about).finished(summary)
        if self._quiet and not self._as_json:
            print_lines([result_line(summary)])
        self._settle()

    def ended(self, error: BaseException, about: Mapping[str, object] | None = None) -> None:
        """An error, which is reported on standard error elsewhere, ends a run or the command."""
        self._events(about).ended(as_reported(error) if isinstance(error, Exception) else error)
        self._settle()

    def all_done(self, outcomes: Sequence[Outcome]) -> None:
        """Several students were trained, or failed."""
        self._of_all.tell("runs", exit_code=exit_code(outcomes), **outcome_values(outcomes))
        if not (self._as_json or self._quiet):
            self._console.print(outcome_table(outcomes))
        self._settle()

    def _events(self, about: Mapping[str, object] | None = None) -> Events:
        return Events(self._write, more=about)

    def _write(self, event: Mapping[str, object]) -> None:
        if self._lines is not None:
            # The words of the format stay; names of metrics are the user's.
            shown = {key: redacted(value, keys=True) for key, value in event.items()}
            self._lines.write(to_json(shown, compact=True) + "\n")

    def _settle(self) -> None:
        settle(self._console)
        if self._lines is not None:
            self._lines.settle()


def train_each(
    configs: Sequence[Config],
    loaded: LoadedConfig,
    folder: Path,
    *,
    fresh: bool,
    output: RunOutput,
    label: Callable[[Config], str] | None = None,
) -> list[Outcome]:
    """Train what each config says, as ``setup.several.run_each`` does, and show it.

    Args:
        loaded: where its errors are placed.
        label: what tells one of the configs from the others; their student where nothing else does.
    """
    from rnow.config import fill_name
    from rnow.setup.several import run_each

    def about(config: Config) -> dict[str, object]:
        return {"student": config.model.path, "name": fill_name(config.model.name or "", config)}

    @contextmanager
    def display(config: Config) -> Iterator[Display]:
        with output.display(about(config)) as shown, placed(loaded):
            yield shown

    def done(config: Config, summary: RunSummary) -> None:
        output.finished(summary.values, about(config))

    def failed(config: Config, error: Exception) -> None:
        output.ended(error, about(config))
        if label is not None:
            print_note(f"{label(config)} failed:")
        report(error)

    named = {} if label is None else {"label": label}
    return run_each(
        configs, folder=folder, fresh=fresh, display=display, done=done, failed=failed, **named
    )
