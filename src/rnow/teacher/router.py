"""Several teachers behind one: each sample is judged by the one of its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.protocols import Teacher
from rnow.types import Sample


class RoutedTeacher:
    """One teacher after the other, so that only one of them need be on a card; what stays is their evidence.

    Args:
        teachers: by role.
        only: has the teacher of a role awake, alone where they share a card, while it is open; and may say more of an error.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        only: Callable[[str], AbstractAsyncContextManager[None]],
    ) -> None:
        self._teachers = teachers
        self._only = only

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``. The teacher of each sample is its ``teacher``.

        Raises:
            KeyError: a sample without one, or with one that is not here.
        """
        asked: dict[str, list[Sample]] = {}
        for sample in samples:
            role = sample.teacher
            if role is None or role not in self._teachers:
                raise KeyError(f"{sample.id} has no teacher among {[*self._teachers]}")
            asked.setdefault(role, []).append(sample)
        evidence: dict[str, Evidence] = {}
        for role, teacher in self._teachers.items():
            if role in asked:
                async with self._only(role):
                    evidence |= await teacher.score(asked[role], needs)
        return evidence
