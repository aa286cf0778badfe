"""What is asked of a teacher, and what came of it, whatever stands behind it."""

from __future__ import annotations

from dataclasses import dataclass

from rnow.errors import RnowError
from rnow.generation.budget import Spent
from rnow.generation.store import Key
from rnow.types import Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One conversation to have: ``sample`` is the index of its rollout."""

    prompt: Prompt
    sample: int
    key: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A conversation that is over.

    Attributes:
        spent: on it, also where it came to nothing.
        unfit: why it is no row, where the rollout itself does not say so.
        fault: why it came to nothing; it will be asked again.
        capped: it was given up because the next request could have crossed a limit.
    """

    rollout: Rollout
    spent: Spent
    unfit: str | None = None
    fault: RnowError | None = None
    capped: bool = False
