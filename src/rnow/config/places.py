"""Where each key of a config was set, and reports that name the places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rnow.config.problems import KeyPath, Problem, dotted
from rnow.config.strict_yaml import Document, Position, excerpt
from rnow.errors import MAX_SHOWN, ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where each key was set: a line of the file or the command line."""

    name: str
    document: Document
    overridden: frozenset[KeyPath] = frozenset()
    moved: Mapping[KeyPath, KeyPath] = field(default_factory=dict)

    def find(self, path: KeyPath, *, column: bool = False) -> str:
        """``config.yml:12 (teacher.path)``, or ``command line (teacher.path)``.

        A key that is not in the file is placed at the nearest enclosing section that is.
        """
        label = f" ({dotted(path)})" if path else ""
        if self.from_command_line(path):
            return f"{COMMAND_LINE}{label}"
        position = self.position(path)
        if position is None:
            return f"{self.name}{label}"
        tail = f":{position.column}" if column else ""
        return f"{self.name}:{position.line}{tail}{label}"

    def where(self, key: str) -> str:
        """The place of a dotted key (``evals[0].step``): ``config.yml:12 (teacher.path)``."""
        parts = key.replace("]", "").replace("[", ".").split(".")
        return self.find(tuple(int(part) if part.isdigit() else part for part in parts))

    def from_command_line(self, path: KeyPath) -> bool:
        """Whether the key, or something around it, was set by an override."""
        path = self.moved.get(path, path)
        if any(path[:n] in self.overridden for n in range(1, len(path) + 1)):
            return True
        # A section that stands there only because of an override inside it.
        made = any(override[: len(path)] == path for override in self.overridden)
        return bool(path) and made and path not in self.document.keys

    def position(self, path: KeyPath, *, exact: bool = False) -> Position | None:
        """The place in the file of the key itself, or (unless ``exact``) of the nearest section around it; None for what
        the command line set."""
        if self.from_command_line(path):
            return None
        path = self.moved.get(path, path)
        while path:
            found = self.document.keys.get(path) or self.document.values.get(path)
            if found or exact:
                return found
            path = path[:-1]
        return None

    def line_of(self, path: KeyPath) -> tuple[str, ...]:
        """The offending line and its caret, when the key stands in the file."""
        position = self.position(path, exact=True)
        return excerpt(self.document.lines, position) if position else ()


def place(problems: Sequence[Problem], places: Places) -> ConfigError:
    """One ConfigError for all problems, each with its place and line."""
    if len(problems) == 1:
        only = problems[0]
        return ConfigError(
            name_key(only),
            where=places.find(only.path, column=True),
            fix=only.hint,
            details=places.line_of(only.path),
        )

    def line(problem: Problem) -> int:
        position = places.position(problem.path)
        return position.line if position else 0  # the command line first

    ordered = sorted(problems, key=line)
    listed = [
        "\n      ".join(
            (
                f"{places.find(problem.path, column=True)}: {problem.describe()}",
                *places.line_of(problem.path)[:1],
            )
        )
        for problem in ordered
    ]
    return ConfigError(
        f"{len(problems)} problems", details=listed[:MAX_SHOWN], more=listed[MAX_SHOWN:]
    )


def name_key(problem: Problem) -> str:
    """The message, with the key in front unless the message has it."""
    if problem.unknown:
        return f'unknown key "{problem.path[-1]}"'
    key = str(problem.path[-1]) if problem.path else ""
    return (
        problem.message
        if not key or key in problem.message
        else f"{problem.key}: {problem.message}"
    )
