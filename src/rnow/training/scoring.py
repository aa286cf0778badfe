"""What the teacher says of a step, asked for at its end or, of a teacher on a machine of its own, while the step is still sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType

from rnow.algorithm.batching import build_samples
from rnow.algorithm.records import Evidence, TeacherNeeds
from rnow.protocols import Teacher
from rnow.types import Prompt, Rollout, RolloutGroup, Sample


class Scoring:
    """The evidence for one step. Used as a context, at whose end nothing is asked any more.

    Args:
        early: ask for each rollout as soon as it is ``finished``. Only for a teacher that takes nothing from who samples, and whose
            word about a sample depends on that sample alone.
    """

    def __init__(self, teacher: Teacher | None, needs: TeacherNeeds, *, early: bool) -> None:
        self._teacher, self._needs = teacher, needs
        self._early = early
        self._asked: dict[str, asyncio.Task[Mapping[str, Evidence]]] = {}

    async def __aenter__(self) -> Scoring:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._asked.values():
            task.cancel()
        # Also those that failed: asyncio shows a traceback of what nobody looked at.
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    def finished(self, prompt: Prompt, rollout: Rollout) -> None:
        """Told of each rollout when nothing more will come of it."""
        if self._teacher is None or not self._early:
            return
        for sample in build_samples([RolloutGroup(prompt=prompt, rollouts=(rollout,))]):
            asking = self._teacher.score([sample], self._needs)
            self._asked[sample.id] = asyncio.ensure_future(asking)

    async def evidence(self, samples: Sequence[Sample]) -> Mapping[str, Evidence] | None:
        """By sample id; None without a teacher.

        Raises:
            RnowError: what the teacher raises, also when it was asked early.
        """
        if self._teacher is None:
            return None
        found: dict[str, Evidence] = {}
        for evidence in await asyncio.gather(*self._asked.values()):
            found |= evidence
        rest = [sample for sample in samples if sample.id not in found]
        if rest:
            found |= await self._teacher.score(rest, self._needs)
        return found
