"""Which answers become rows: the conditions of ``--keep-if``, and what can never be one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rnow.errors import InputError
from rnow.text.suggest import closest, did_you_mean

OPTION = "--keep-if"
TOTAL = "reward"
"""The rewards of a row taken together."""
_OWN = ("tokens", "turns")
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(
    r"\s*(?P<name>[^\s<>=!]+)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_AND = re.compile(r"\s+and\s+|,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """``reward >= 1``."""

    name: str
    sign: str
    number: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.number:g}"

    @property
    def of_rewards(self) -> bool:
        """Whether it asks for what a reward said."""
        return self.name not in _OWN

    def holds(self, value: float) -> bool:
        """Whether a value meets it."""
        return _COMPARE[self.sign](value, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What is judged of an answer.

    Attributes:
        tokens: that the teacher wrote.
        total, rewards, failed: the row's rewards together and by name, and the names of those that failed; ``total`` is None
            for a row without.
    """

    tokens: int
    turns: int
    total: float | None = None
    rewards: Mapping[str, float] | None = None
    failed: Collection[str] = ()


def read_conditions(text: str, rewards: Sequence[str]) -> tuple[Condition, ...]:
    """``reward>=1 and tokens<2000`` as conditions, all of which must hold.

    Args:
        rewards: the functions of rewards.py, which may be named.

    Raises:
        InputError: it cannot be read, or names what there is not.
    """
    known = (TOTAL, *_OWN, *(name for name in rewards if name not in (TOTAL, *_OWN)))
    found = []
    for part in _AND.split(text):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise InputError(
                f"{part.strip()!r} is no condition",
                where=OPTION,
                why="a condition is a name, a comparison and a number",
                fix=f'write it like "{TOTAL}>=1" or "{TOTAL}>=1 and tokens<2000"',
            )
        if match["name"] not in known:
            near = did_you_mean(closest(match["name"], known))
            raise InputError(
                f"there is nothing named {match['name']!r} to compare",
                where=OPTION,
                why=f"there are {', '.join(known)}",
                fix=near or "name one of these",
            )
        found.append(
            Condition(name=match["name"], sign=match["sign"], number=float(match["number"]))
        )
    return tuple(found)


def why_rejected(answer: Judged, conditions: Sequence[Condition]) -> str | None:
    """The first condition that does not hold, in words; None for an answer that is kept."""
    for condition in conditions:
        if condition.name == "tokens":
            value = float(answer.tokens)
        elif condition.name == "turns":
            value = float(answer.turns)
        else:
            if wrong := _failed(answer, condition.name):
                return f"reward {wrong} failed"
            value = answer.total if condition.name == TOTAL else _own(answer, condition.name)
        if value is None:
            return f"{condition.name} is not among its rewards"
        if not condition.holds(value):
            return f"not {condition}"
    return None


def _failed(answer: Judged, name: str) -> str | None:
    """A reward that failed and that the condition needs."""
    needed = answer.failed if name == TOTAL else [one for one in answer.failed if one == name]
    return min(needed, default=None)


def _own(answer: Judged, name: str) -> float | None:
    return (answer.rewards or {}).get(name)
