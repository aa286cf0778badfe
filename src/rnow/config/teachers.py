"""The teachers that a config names, and whose rows each of them judges."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnow.config.problems import KeyPath
from rnow.config.schema import Control, TeacherSection

if TYPE_CHECKING:
    from rnow.config.schema import Schema

TEACHER = "teacher"
"""The role of the model in the section ``teacher``; every other teacher is ``teacher/<name>``."""

TOLD_TO_TEACHERS = ("template", "system_prompt")
"""Keys of a teacher's section."""

API_KEY = "RNOW_TEACHER_API_KEY"
"""The variable that holds the key of teachers' servers; one of several may have its own, ``key_variable``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """Every teacher once: equal sections are one, under the first of its names.

    Attributes:
        sections: role -> the key of its section, and the section.
        named: each name in ``teachers`` -> its role.
        of_dataset: name of a dataset -> the role that judges the rows which name nobody; None where there is none.
    """

    sections: Mapping[str, tuple[KeyPath, TeacherSection]]
    named: Mapping[str, str]
    of_dataset: Mapping[str, str | None]


def find_teachers(config: Schema) -> Teachers:
    """The teachers of a config: ``teacher``, ``teachers``, and those that datasets have of their own."""
    sections: dict[str, tuple[KeyPath, TeacherSection]] = {}

    def role_of(role: str, key: KeyPath, section: TeacherSection) -> str:
        for known, (_, other) in sections.items():
            if other == section:
                return known
        sections[role] = key, section
        return role

    default = None
    if config.teacher is not None:
        default = role_of(TEACHER, ("teacher",), config.teacher)
    named = {
        name: role_of(f"{TEACHER}/{name}", ("teachers", name), section)
        for name, section in config.teachers.items()
    }
    of_dataset: dict[str, str | None] = {}
    own = dict(own_teachers(config))
    for index, source in enumerate(config.data.sources):
        role = named.get(source.teacher, default) if isinstance(source.teacher, str) else default
        if index in own:
            role = role_of(f"{TEACHER}/{source.name}", _key_of_own(index), own[index])
        of_dataset[source.name] = role
    return Teachers(sections=sections, named=named, of_dataset=of_dataset)


def own_teachers(config: Schema) -> Iterator[tuple[int, TeacherSection]]:
    """The datasets that have a teacher of their own, by index: a section, or a path, which is what no name in ``teachers`` is."""
    for index, source in enumerate(config.data.sources):
        if isinstance(source.teacher, TeacherSection):
            yield index, source.teacher
        elif source.teacher is not None and source.teacher not in config.teachers:
            yield index, TeacherSection(path=source.teacher)


def teacher_sections(config: Schema) -> Iterator[tuple[KeyPath, TeacherSection]]:
    """Every section that describes a teacher, equal ones too, by its key."""
    if config.teacher is not None:
        yield ("teacher",), config.teacher
    for name, section in config.teachers.items():
        yield ("teachers", name), section
    for index, section in own_teachers(config):
        yield _key_of_own(index), section


def any_served(config: Schema) -> bool:
    """Whether one of the teachers is behind a server, ours or another, which gives log-probabilities only."""
    return any(s.url is not None or s.backend == "vllm" for _, s in teacher_sections(config))


def any_crossed(config: Schema) -> bool:
    """Whether one of the teachers has another tokenizer than the student."""
    return any(section.tokenizer == "cross" for _, section in teacher_sections(config))


def control_of(config: Schema) -> Control | None:
    """The control that the run is, said in any of its teachers' sections; None where the teachers teach."""
    return next((s.control for _, s in teacher_sections(config) if s.control is not None), None)


def key_variable(role: str) -> str:
    """``RNOW_TEACHER_MATH_API_KEY`` for ``teacher/math``."""
    name = re.sub(r"[^A-Za-z0-9]", "_", role.removeprefix(f"{TEACHER}/")).upper()
    return API_KEY if role == TEACHER else f"RNOW_TEACHER_{name}_API_KEY"


def _key_of_own(index: int) -> KeyPath:
    return "data", "train_file", index, "teacher"


def without_told(data: object) -> object:
    """A config as plain data, without what teachers alone are told: for what leaves the run's folder."""
    if isinstance(data, list):
        return [without_told(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: without_told(item) for key, item in data.items() if key not in TOLD_TO_TEACHERS}
