"""A judge that cannot be asked for a while: the run waits for it, and ends for now rather than train on what it did not say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from rnow import progress
from rnow.errors import SAME_COMMAND, TemporaryError
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome

JUDGE_PATIENCE = 600.0
"""Seconds that a run which learns from a judge waits for it: as for a teacher's server."""

FIRST_PATIENCE = 60.0
"""The same for a reward that has not given a number yet: its judge may never have been there."""

FIRST_PAUSE = 2.0
LONGEST_PAUSE = 30.0


class Outage:
    """Calls rewards again while their judge cannot be asked (``CallOutcome.passing``).

    Args:
        patience: seconds from the first failure of a call; 0: its failure is its outcome.
        warn: told when the waiting for a reward's judge begins, once until it answers.
    """

    def __init__(self, patience: float, warn: Callable[[str], None]) -> None:
        self._patience = patience
        self._warn = warn
        self._answered: set[str] = set()
        self._waiting: set[str] = set()

    async def call(
        self, info: FunctionInfo, attempt: Callable[[], Awaitable[CallOutcome]]
    ) -> CallOutcome:
        """The outcome of ``attempt``, once it is not that the judge cannot be asked.

        Raises:
            TemporaryError: the judge could not be asked for too long.
        """
        began, pause = time.monotonic(), FIRST_PAUSE
        while (outcome := await attempt()).passing and self._patience:
            first = info.name not in self._answered
            limit = min(self._patience, FIRST_PATIENCE) if first else self._patience
            if time.monotonic() - began + pause > limit:
                raise _gave_up(info, outcome, limit)
            self._tell(info, outcome, limit)
            progress.moved(ahead=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if outcome.status == "ok":
            self._answered.add(info.name)
            self._waiting.discard(info.name)
        return outcome

    def _tell(self, info: FunctionInfo, outcome: CallOutcome, limit: float) -> None:
        if info.name not in self._waiting:
            self._waiting.add(info.name)
            self._warn(
                f'waiting up to {limit:g} s for the judge of reward "{info.name}": {outcome.error}'
            )


def _gave_up(info: FunctionInfo, outcome: CallOutcome, limit: float) -> TemporaryError:
    return TemporaryError(
        f'the judge of reward "{info.name}" could not be asked for {limit:g} s',
        title="Judge unavailable",
        where=outcome.place or info.place,
        why=outcome.error,
        fix=f"look at the judge's server (`rnow test` asks it again; timeout= of @reward and of llm_judge give a slow one "
        f"more time), then {SAME_COMMAND}: it continues from there",
    )
