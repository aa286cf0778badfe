"""One fault of a config, and the error that carries up to ten of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rnow.errors import MAX_SHOWN, ConfigError

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """``("evals", 0, "step")`` -> ``evals[0].step``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A fault at one key. ``hint`` says what to write instead; ``unknown`` marks a key that does not exist."""

    path: KeyPath
    message: str
    hint: str | None = None
    unknown: bool = False

    @property
    def key(self) -> str:
        """The dotted key, or ``config`` for the whole."""
        return dotted(self.path) or "config"

    def describe(self) -> str:
        """The fault in one line, without its place."""
        return self.message + (f" ({self.hint})" if self.hint else "")


class InvalidValues(ConfigError):
    """Values that do not fit the schema. ``problems`` holds all of them; the report shows the first ten."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(only.message, where=only.key, fix=only.hint)
        else:
            lines = [f"{p.key}: {p.describe()}" for p in self.problems]
            super().__init__(
                f"{len(lines)} problems", details=lines[:MAX_SHOWN], more=lines[MAX_SHOWN:]
            )
