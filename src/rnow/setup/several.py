"""Several runs, one after the other: one for each student of a list, or of a study. One that fails holds up none of the others."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rnow.config import Config, fill_name
from rnow.display.display import Display
from rnow.errors import RnowError, StopRequested
from rnow.setup.build import check, run
from rnow.setup.facts import RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one of the runs ended: with a summary, or with an error. ``name`` is the run's."""

    student: str
    name: str
    summary: RunSummary | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str | None:
        """Why it failed."""
        if self.error is None or isinstance(self.error, RnowError):
            return self.error and self.error.message
        return f"{type(self.error).__name__}: {self.error}"


def run_each(
    configs: Sequence[Config],
    *,
    folder: Path,
    fresh: bool,
    display: Callable[[Config], AbstractContextManager[Display]],
    done: Callable[[Config, RunSummary], None],
    failed: Callable[[Config, Exception], None],
    label: Callable[[Config], str] = lambda config: config.model.path,
) -> list[Outcome]:
    """Train what these configs say, each as ``run`` does in a run folder of its own. What a run would refuse is told of all
    of them before the first one trains; the others train all the same.

    Args:
        display: makes what is told of one run.
        done: told of each that is trained, as it is done.
        failed: told of each that fails, as it fails.
        label: what tells one of the configs from the others.

    Raises:
        StopRequested: Ctrl-C or SIGTERM. It ends all; the same command goes on with the one that was stopped.
    """
    outcomes: dict[int, Outcome] = {}

    def note(index: int, error: Exception) -> None:
        config = configs[index]
        failed(config, error)
        _let_go(error)
        outcomes[index] = _outcome(config, error=error)

    for index, config in enumerate(configs):
        try:
            with display(config) as shown:
                shown.stage(f"checking {label(config)}")
                check(config, folder)
        except Exception as error:
            note(index, error)
    waiting = [index for index in range(len(configs)) if index not in outcomes]
    for place, index in enumerate(waiting):
        config = configs[index]
        try:
            with display(config) as shown:
                summary = run(config, folder=folder, fresh=fresh, display=shown)
            done(config, summary)
            outcomes[index] = _outcome(config, summary=summary)
        except StopRequested as stop:
            left = [label(configs[other]) for other in waiting[place + 1 :]]
            stop.details = (*stop.details, *(f"not begun: {name}" for name in left))
            raise
        except Exception as error:
            note(index, error)
        _free_memory()
    return [outcomes[index] for index in range(len(configs))]


def _outcome(
    config: Config, *, summary: RunSummary | None = None, error: Exception | None = None
) -> Outcome:
    name = fill_name(config.model.name or "", config)
    return Outcome(student=config.model.path, name=name, summary=summary, error=error)


def _let_go(error: BaseException) -> None:
    """Its traceback, and those of what led to it, hold what the run had loaded: the next would find no room beside it."""
    error.__traceback__ = None
    causes = [error.__cause__, error.__context__]
    for other in [*causes, *(error.exceptions if isinstance(error, BaseExceptionGroup) else ())]:
        if other is not None and other.__traceback__ is not None:
            _let_go(other)


def _free_memory() -> None:
    """What the last run held, for the next: models are part of cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
