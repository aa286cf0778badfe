"""Values of the config inside the name of a run, so that a sweep needs no names of its own: ``lr-{trainer.learning_rate}``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rnow.config.overrides import show
from rnow.config.problems import Problem
from rnow.config.schema import KEYS
from rnow.config.suggest import suggest

if TYPE_CHECKING:
    from rnow.config.schema import Schema

NAME = "model.name"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill_name(name: str, config: Schema) -> str:
    """The name with the value of each key in braces, written as in YAML."""
    return _PLACEHOLDER.sub(lambda match: show(_value(config, match[1])), name)


def name_problems(config: Schema) -> Iterator[Problem]:
    """Braces in ``model.name`` that hold no key, or one without a value to write."""
    for key in _PLACEHOLDER.findall(config.model.name or ""):
        path = tuple(NAME.split("."))
        if key not in KEYS:
            known = suggest(tuple(key.split("."))) if all(key.split(".")) else None
            yield Problem(path=path, message=f"{{{key}}} is not a key of the config", hint=known)
        elif key == NAME or isinstance(_value(config, key), tuple):
            why = "the name itself" if key == NAME else "a list"
            hint = "name a key with one value, such as {trainer.learning_rate}"
            yield Problem(path=path, message=f"{{{key}}} is {why}", hint=hint)


def _value(config: Schema, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part, None)  # of a section that is not there: not set
    return value
