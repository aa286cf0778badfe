"""Values that the schema knows and this version does not implement: refused, never ignored.

This list is the only place; whoever builds a feature deletes its line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnow.errors import NotYetSupported

if TYPE_CHECKING:
    from rnow.config.schema import Config


@dataclass(frozen=True, slots=True)
class Reserved:
    """A key, the values of it that are refused (as a test and in words), and what to do instead."""

    key: str
    values: str
    refuses: Callable[[Any], bool]
    fix: str


RESERVED = (
    Reserved(
        "dataset_type",
        "sft, midtrain",
        lambda v: v in ("sft", "midtrain"),
        "use dataset_type: distill or rl",
    ),
    Reserved(
        "data.train_file",
        "{teacher: ...}",
        lambda v: any(source.teacher is not None for source in v),
        "use one teacher for all datasets: teacher.path",
    ),
    Reserved(
        "algorithm.adv_estimator",
        "gae",
        lambda v: v == "gae",
        "use adv_estimator: grpo or reinforce",
    ),
    Reserved(
        "algorithm.kl_estimator",
        "exact, topk",
        lambda v: v != "sampled",
        "use kl_estimator: sampled",
    ),
    Reserved("algorithm.kl_baseline", "expected", lambda v: v != "none", "use kl_baseline: none"),
    Reserved("algorithm.kl_discount", "above 0", lambda v: v != 0, "use kl_discount: 0"),
)

SEVERAL_STUDENTS = ("model.path", "a list of several")
"""Refused while the value is read (``normalise.one_path``): each student would be a config of its own."""


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key; None inside an absent section."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def refuse_dataset_type(value: object, where: str) -> None:
    """Refuse a reserved dataset_type before the rest is read: its rules about other keys would only mislead."""
    entry = RESERVED[0]
    if isinstance(value, str) and value in entry.values.split(", "):
        raise refusal(entry, value, where)


def refusal(entry: Reserved, value: Any, where: str) -> NotYetSupported:
    """The error for one reserved setting."""
    return NotYetSupported(
        f"{entry.key}: {_shown(value)} is not supported yet",
        where=where,
        why="the setting is reserved and would do nothing",
        fix=entry.fix,
    )


def refuse_reserved(config: Config, where: Callable[[str], str] | None = None) -> None:
    """Refuse a setting that does nothing yet.

    Args:
        config: a valid config.
        where: names the place of a key; the key itself by default.

    Raises NotYetSupported for the first such setting.
    """
    for entry in RESERVED:
        value = value_at(config, entry.key)
        if value is None and entry.key.startswith("teacher."):
            continue
        if entry.refuses(value):
            raise refusal(entry, value, where(entry.key) if where else entry.key)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        if value and not isinstance(value[0], str):
            return "a teacher for one dataset"
        return ", ".join(map(str, value))
    return str(value)
