"""The student's own base as the teacher: of itself, where it is told more (``teacher.path: self``), and what keeps
``dataset_type: rl`` near the model it started from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Sample


class ReferenceTeacher:
    """Scores with the weights that the trainer holds anyway, its adapter switched off meanwhile.

    Args:
        trainer: scores with the student as it is now.
        without_adapter: switches the adapter off while it is open (PEFT's ``disable_adapter``).
    """

    def __init__(
        self,
        trainer: TransformersTeacher,
        without_adapter: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._trainer = trainer
        self._without_adapter = without_adapter

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``."""
        with self._without_adapter():
            return self._trainer.score_now(samples, needs)
