"""The learning rate as a pure function of the update number."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def learning_rate(
    update: int, *, base: float, warmup: int, total: int, schedule: ScheduleName
) -> float:
    """Learning rate of the ``update``-th optimizer step (from 0): linear warm-up over ``warmup`` steps, then constant, or
    falling to 0 at ``total`` linearly or along a half cosine."""
    if update < warmup:
        return base * (update + 1) / warmup
    if schedule == "constant":
        return base
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return base * (1.0 - progress)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
