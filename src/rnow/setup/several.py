"""One run for each student of a list, one after the other. One that fails holds up none of the others."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rnow.config import Config, fill_name
from rnow.display.display import Display
from rnow.errors import StopRequested
from rnow.setup.build import check, run
from rnow.setup.facts import RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the run of one student ended: with a summary, or with an error. ``name`` is the run's."""

    student: str
    name: str
    summary: RunSummary | None = None
    error: Exception | None = None


def run_each(
    configs: Sequence[Config],
    *,
    folder: Path,
    fresh: bool,
    display: Callable[[], AbstractContextManager[Display]],
    failed: Callable[[Config, Exception], None],
) -> list[Outcome]:
    """Train the students of these configs, each as ``run`` does in a run folder of its own. What a run would refuse is told of all
    of them before the first one trains; the others train all the same.

    Args:
        display: makes what is told of one run.
        failed: told of each that fails, as it fails.

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
            with display() as shown:
                shown.stage(f"checking {config.model.path}")
                check(config, folder)
        except Exception as error:
            note(index, error)
    waiting = [index for index in range(len(configs)) if index not in outcomes]
    for place, index in enumerate(waiting):
        config = configs[index]
        try:
            with display() as shown:
                summary = run(config, folder=folder, fresh=fresh, display=shown)
            outcomes[index] = _outcome(config, summary=summary)
        except StopRequested as stop:
            left = [configs[other].model.path for other in waiting[place + 1 :]]
            stop.details = (*stop.details, *(f"not begun: {path}" for path in left))
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
