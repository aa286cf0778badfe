"""From a file and the command line to a Config, with every fault named at its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rnow.config.json_text import parse_json_document
from rnow.config.legacy import migrate
from rnow.config.notices import find_notices
from rnow.config.overrides import (
    COMMAND_LINE,
    apply_overrides,
    describe_changes,
    parse_override,
)
from rnow.config.problems import MAX_SHOWN, InvalidValues, KeyPath, Problem, dotted
from rnow.config.reserved import refuse_dataset_type, refuse_reserved
from rnow.config.schema import Config
from rnow.config.strict_yaml import Document, Position, decode, excerpt, parse_document
from rnow.errors import ConfigError, NotYetSupported

FILE_NAMES = ("config.yml", "config.yaml", "config.json")


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
        path = self.original(path)
        if self.from_command_line(path):
            return f"{COMMAND_LINE}{label}"
        position = self.position(path)
        if position is None:
            return f"{self.name}{label}"
        tail = f":{position.column}" if column else ""
        return f"{self.name}:{position.line}{tail}{label}"

    def original(self, path: KeyPath) -> KeyPath:
        """The key as it was written, when a legacy key was moved."""
        return self.moved.get(path, path)

    def from_command_line(self, path: KeyPath) -> bool:
        """Whether the key, or something around it, was set by an override."""
        return any(path[:n] in self.overridden for n in range(1, len(path) + 1))

    def position(self, path: KeyPath, *, exact: bool = False) -> Position | None:
        """The place of the key itself, or (unless ``exact``) of the nearest section around it."""
        while path:
            found = self.document.keys.get(path) or self.document.values.get(path)
            if found or exact:
                return found
            path = path[:-1]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A config and what there is to say about it.

    ``changes`` are the overrides as ``key: old -> new``; ``path`` is the file that was read.
    """

    config: Config
    path: Path
    warnings: list[str]
    changes: list[str]
    places: Places

    def where(self, key: str) -> str:
        """The place of a dotted key: ``config.yml:12 (teacher.path)``."""
        return self.places.find(parse_key(key))


def parse_key(key: str) -> KeyPath:
    """``evals[0].step`` -> ``("evals", 0, "step")``."""
    parts = key.replace("]", "").replace("[", ".").split(".")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def find_config_file(path: Path) -> Path:
    """The config file of a folder, or the file itself.

    Raises ConfigError when there is none, or more than one.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if not found:
        raise ConfigError(
            "no config.yml here",
            where=str(path.resolve()),
            fix="go to your project folder, or start one with rnow init",
        )
    if len(found) > 1:
        raise ConfigError(
            f"more than one config: {', '.join(file.name for file in found)}",
            where=str(path.resolve()),
            fix="keep one of them",
        )
    return found[0]


def read_document(path: Path) -> Document:
    """Read and parse a config file, YAML or (by its name) JSON."""
    name = str(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError("no such file", where=name, fix="check the path of the config") from None
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror or error}", where=name) from None
    text = decode(raw, name)
    if path.suffix == ".json":
        return parse_json_document(text, name)
    return parse_document(text, name)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config file (or the one in a folder), apply overrides and check everything.

    Args:
        path: config.yml, config.yaml or config.json, or a folder with one of them.
        overrides: ``key=value`` settings; a later one wins.

    Raises:
        ConfigError: with file, line and column of each fault, ten at most.
        NotYetSupported: for a setting that this version only reserves.
    """
    file = find_config_file(Path(path))
    document = read_document(file)
    settings = [parse_override(text) for text in overrides]
    migration = migrate(apply_overrides(document.data, settings))
    places = Places(
        name=str(file),
        document=document,
        overridden=frozenset(setting.path for setting in settings),
        moved=migration.moved,
    )
    refuse_dataset_type(migration.data.get("dataset_type"), places.find(("dataset_type",)))
    try:
        config = Config(**migration.data)
    except InvalidValues as error:
        raise place(error.problems, places) from None
    except NotYetSupported as error:
        raise NotYetSupported(
            error.message,
            where=places.find(parse_key(error.where)) if error.where else None,
            why=error.why,
            fix=error.fix,
        ) from None
    refuse_reserved(config, lambda key: places.find(parse_key(key)))
    return LoadedConfig(
        config=config,
        path=file,
        warnings=migration.warnings + find_notices(config),
        changes=describe_changes(document.data, settings),
        places=places,
    )


def place(problems: Sequence[Problem], places: Places) -> ConfigError:
    """One ConfigError for all problems, each with its place and line."""
    if len(problems) == 1:
        only = problems[0]
        return ConfigError(
            name_key(only),
            where=places.find(only.path, column=True),
            fix=only.hint,
            details=line_of(only, places),
        )
    details: list[str] = []
    ordered = sorted(problems, key=lambda p: line_number(p, places))
    for problem in ordered[:MAX_SHOWN]:
        details.append(f"{places.find(problem.path, column=True)}: {problem.describe()}")
        details += [f"    {line}" for line in line_of(problem, places)[:1]]
    if len(ordered) > MAX_SHOWN:
        details.append(f"... and {len(ordered) - MAX_SHOWN} more")
    return ConfigError(f"{len(problems)} problems", details=details)


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


def line_number(problem: Problem, places: Places) -> int:
    """For reading order: the line of the key, with the command line first."""
    path = places.original(problem.path)
    position = None if places.from_command_line(path) else places.position(path)
    return position.line if position else 0


def line_of(problem: Problem, places: Places) -> tuple[str, ...]:
    """The offending line, when the key stands in the file."""
    path = places.original(problem.path)
    if places.from_command_line(path):
        return ()
    position = places.position(path, exact=True)
    return excerpt(places.document.lines, position) if position else ()
