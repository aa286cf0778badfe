"""Asking the teacher, if there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rnow.algorithm.records import Evidence
from rnow.protocols import Teacher
from rnow.types import Sample


async def score_with_teacher(
    samples: Sequence[Sample], teacher: Teacher | None
) -> Mapping[str, Evidence] | None:
    """Evidence by sample id, or None in a run without a teacher."""
    return None if teacher is None else await teacher.score(samples)
