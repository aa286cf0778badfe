"""Why ``llm_judge`` gives no score."""

from __future__ import annotations


class JudgeError(RuntimeError):
    """The judge gave no usable score: it is asked wrongly, refuses, or its answer is outside the schema."""


class JudgeUnavailable(JudgeError):
    """The judge cannot be asked now: unreachable, too slow, overloaded (429) or broken (5xx). It may answer later."""
