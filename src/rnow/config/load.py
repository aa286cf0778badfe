"""From keywords, or from a file and the command line, to a Config, with every fault named at its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rnow.config.checks import find_contradictions
from rnow.config.explain import explain
from rnow.config.json_text import parse_json_document
from rnow.config.legacy import migrate
from rnow.config.normalise import several_students
from rnow.config.notices import find_notices
from rnow.config.overrides import apply_overrides, describe_changes, parse_override
from rnow.config.places import Places, place
from rnow.config.problems import InvalidValues
from rnow.config.schema import SECTION_NAMES, Schema
from rnow.config.strict_yaml import Document, decode, parse_document
from rnow.config.students import each_student
from rnow.errors import ConfigError
from rnow.text.user_files import is_present, read_regular

FILE_NAMES = ("config.yml", "config.yaml", "config.json")
RL_DEFAULTS = {"kl_penalty_coef": 0.01, "reward_coef": 1.0}
ROWS_DEFAULTS = {"learning_rate": 5e-5}
"""Of sft and midtrain, in ``trainer``."""


class Config(Schema):
    """A validated config.yml. Build it from keywords (nested dicts) or with ``Config.from_file``.

    Raises:
        InvalidValues: (a ConfigError) naming every key that does not fit.
        ConfigError: for a list of several students too: each is a config of its own.
    """

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**fill_defaults(values))
        except ValidationError as error:
            raise InvalidValues(explain(error)) from None
        if problems := list(find_contradictions(self)):
            raise InvalidValues(problems)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read config.yml or config.json (or the folder that holds one), with ``key=value`` overrides.

        Raises ConfigError, for a list of several students too. Warnings are available from ``rnow.config.load_config``.
        """
        return load_config(path, overrides).config


def fill_defaults(values: Mapping[str, object]) -> dict[str, Any]:
    """Drop empty sections (a header whose keys are all commented out) and fill defaults that depend on dataset_type."""
    filled = {k: v for k, v in values.items() if not (k in SECTION_NAMES and v is None)}
    algorithm = filled.get("algorithm", {})
    if isinstance(algorithm, Mapping):
        algorithm = {k: v for k, v in algorithm.items() if not (k in RL_DEFAULTS and v is None)}
        if filled.get("dataset_type") == "rl":
            algorithm = {**RL_DEFAULTS, **algorithm}
        filled["algorithm"] = algorithm
    trainer = filled.get("trainer", {})
    if isinstance(trainer, Mapping) and filled.get("dataset_type") in ("sft", "midtrain"):
        filled["trainer"] = {**ROWS_DEFAULTS, **trainer}
    return filled


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A config and what there is to say about it.

    ``configs``: one for each student of ``model.path``, in order. ``changes`` are the overrides as ``key: old -> new``; ``path`` is
    the file that was read.
    """

    configs: tuple[Config, ...]
    path: Path
    warnings: list[str]
    changes: list[str]
    places: Places

    @property
    def config(self) -> Config:
        """The config of the only student. Raises ConfigError where there are several."""
        config, *others = self.configs
        if others:
            raise several_students([config.model.path for config in self.configs])
        return config


def has_config(folder: Path) -> bool:
    """Whether there is a config file in a folder."""
    return any((folder / name).exists() for name in FILE_NAMES)


def config_for(model: str, overrides: Sequence[str] = ()) -> Config:
    """A config for a model outside of any project: all but the overrides at its default.

    Raises ConfigError.
    """
    settings = [parse_override(text) for text in overrides]
    bare = {"dataset_type": "rl", "model": {"path": model}}
    return Config(**apply_overrides(bare, settings))


def find_config_file(path: Path) -> Path:
    """The config file of a folder, or the file itself.

    Raises ConfigError when there is none, or more than one.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in FILE_NAMES if is_present(path / name)]
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
        raw = read_regular(path)
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

    Raises ConfigError with file, line and column of each fault, ten at most.
    """
    file = find_config_file(Path(path))
    document = read_document(file)
    settings = [parse_override(text) for text in overrides]
    data, warnings, moved = migrate(apply_overrides(document.data, settings))
    places = Places(
        name=str(file),
        document=document,
        overridden=frozenset(setting.path for setting in settings),
        moved=moved,
    )
    try:
        configs = [Config(**one) for one in each_student(data, folder=file.resolve().parent.name)]
    except InvalidValues as error:
        raise place(error.problems, places) from None
    except ConfigError as error:
        error.where = places.where(error.where) if error.where else None
        raise
    return LoadedConfig(
        configs=tuple(configs),
        path=file,
        warnings=warnings + find_notices(configs[0]),
        changes=describe_changes(document.data, settings),
        places=places,
    )
