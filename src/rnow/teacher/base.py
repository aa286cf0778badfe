"""The student with other adapter weights as the teacher: its own base, where it is told more (``teacher.path: self``), and the
student as the run began, which ``dataset_type: rl`` stays near."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Sample


class ReferenceTeacher:
    """Scores with the weights that the trainer holds anyway, its adapter switched off or exchanged meanwhile.

    Args:
        trainer: scores with the student as it is now.
        as_reference: makes the student the reference while it is open (PEFT's ``disable_adapter``).
    """

    def __init__(
        self,
        trainer: TransformersTeacher,
        as_reference: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._trainer = trainer
        self._as_reference = as_reference

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``."""
        with self._as_reference():
            return self._trainer.score_now(samples, needs)
