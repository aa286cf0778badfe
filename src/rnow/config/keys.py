"""What a key of config.yml says about itself, next to its type and its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

Change = Literal[
    "free", "length", "warn", "samples", "measures", "evaluates", "shapes", "judges", "refuse"
]
"""What another value means for a run that was started before.

free: no trained number depends on it (names, saving, placement, deadlines of rewards).
length: free under a constant learning rate; under another one, which ends where the run does, as warn.
warn: training goes on differently; what was sampled and evaluated already holds.
samples: as warn, and what was sampled already does not hold; evaluations do.
measures: training is untouched; what was evaluated already does not hold.
evaluates: as warn, and what was evaluated already does not hold.
shapes: as evaluates, and what was sampled already does not hold either.
judges: as refuse, but what was sampled already and not trained on yet holds.
refuse: the checkpoint would be meaningless.
"""

Reader = Literal[
    "every run", "answers", "tools", "several turns", "vllm sampler", "local vllm sampler", "embedded sampler",
    "local teacher", "vllm teacher", "local vllm teacher", "top k", "kl clamp", "importance ratio", "surrogate", "value head",
]  # fmt: skip
"""Who reads a key. ``plan.unread`` tells which of them a run has; to the others a key makes no difference.

answers: of the student, which distill and rl sample and sft and midtrain do not.
several turns: rollouts that can have more than one. local: loaded or started by this run, not behind a given url.
top k, kl clamp, importance ratio, surrogate: parts of objectives; which has which is what ``setup.objective`` builds.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """What a key says about itself; see ``key``."""

    default_text: str | None
    type_text: str | None
    change: Change | None
    reader: Reader | None


def key(
    default: object,
    description: str,
    default_text: str | None = None,
    type_text: str | None = None,
    *,
    change: Change | None = None,
    reader: Reader | None = None,
    **limits: Any,
) -> Any:
    """A pydantic field with a ``Key`` in its metadata.

    Args:
        default: ``...`` for a key that is required.
        description: a sentence for the documentation.
        default_text, type_text: how the documentation words default and type, where they do not speak for themselves.
        change: what another value means for a run that was started before; None is what the section says.
        reader: who reads the key; None is what the section says. To a run without that reader it makes no difference.
        limits: pydantic's own (``ge``, ``lt``, ``min_length``, ...).
    """
    field = Field(default, description=description, **limits)
    field.metadata.append(Key(default_text, type_text, change, reader))
    return field
