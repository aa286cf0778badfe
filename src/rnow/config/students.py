"""A list at ``model.path``: one run for each student, each with a name of its own. Plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rnow.config.normalise import plain_path
from rnow.errors import ConfigError

PATH = "model.path"
BY_NAME = f"{{{PATH}}}"
"""A placeholder in the name that tells the students apart already."""


def each_student(data: Mapping[str, Any], *, folder: str) -> list[dict[str, Any]]:
    """The config of each student, in the order of the list; one config where there is one student, as it is.

    The run of each is named ``NAME-STUDENT``: ``model.name`` (else ``project_name``, else ``folder``) and the last part of the
    student's path, or the whole path where two end alike. A name with ``{model.path}`` in it stays.

    Args:
        folder: the name of the project's folder.

    Raises:
        ConfigError: a student is listed twice.
    """
    model = data.get("model")
    paths = model.get("path") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(paths, list | tuple) or len(paths) < 2:
        return [dict(data)]
    students = [plain_path(path) for path in paths]
    if twice := [path for index, path in enumerate(students) if path in students[:index]]:
        raise ConfigError(
            f"model.path lists {twice[0]} twice", where=PATH, fix="list each student once"
        )
    last = [_last_part(path) for path in students]
    name = model.get("name") or data.get("project_name") or folder
    made = []
    for path, short in zip(students, last, strict=True):
        own = str(path) if last.count(short) > 1 else short
        # Not a placeholder: a folder may have braces in its name.
        own = own.replace("{", "-").replace("}", "-")
        named = name if BY_NAME in str(name) else f"{name}-{own}"
        made.append({**data, "model": {**model, "path": path, "name": named}})
    return made


def _last_part(path: object) -> str:
    text = str(path).rstrip("/")
    return text.rpartition("/")[2] or text
