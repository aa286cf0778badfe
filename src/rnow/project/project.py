"""A project folder as one record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rnow.config import Config
from rnow.config.problems import dotted
from rnow.config.teachers import find_teachers, teacher_sections
from rnow.errors import InputError
from rnow.project.dataset import Dataset, load_dataset
from rnow.project.rows import RowRules
from rnow.project.secrets import load_secrets, reading_redactor, writing_redactor
from rnow.project.user_code import load_rewards
from rnow.text.redact import Redactor
from rnow.text.user_files import is_present
from rnow.usercode.functions import FunctionInfo

TOOLS_FILE = "tools.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What a folder holds beside its config: prompts, reward functions by name, and secrets by name. ``agentic``: the
    student has tools. ``redact`` takes every secret out of what is written and shown, ``redact_read`` those out of what the
    student reads that are plainly one."""

    folder: Path
    dataset: Dataset
    rewards: Mapping[str, FunctionInfo] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    agentic: bool = False
    redact: Redactor = field(default_factory=Redactor, repr=False)
    redact_read: Redactor = field(default_factory=Redactor, repr=False)


def is_agentic(folder: Path, config: Config) -> bool:
    """Whether the student has tools: there is a tools.py or an mcp_url, and ``teacher.agentic`` does not say no.

    Raises InputError where it says yes and there is neither.
    """
    said = {f"{dotted(path)}.agentic": s.agentic for path, s in teacher_sections(config)}
    found = _has_tools(Path(folder), config)
    for key, wanted in said.items():
        if wanted and not found:
            raise InputError(
                f"{key} is true, but there are no tools",
                where=key,
                why="there is neither a tools.py beside config.yml nor a rollout.mcp_url",
                fix=f"write one of them, or remove {key}",
            )
    return found and False not in said.values()


def _has_tools(folder: Path, config: Config) -> bool:
    return is_present(folder / TOOLS_FILE) or bool(config.rollout.mcp_url)


def load_project(folder: Path, config: Config, *, tools: Collection[str] = ()) -> Project:
    """Read and check the whole folder; nothing is written and no model is touched.

    Args:
        tools: names of everything the student can call, for the rows that name some.

    Raises InputError (DataError, NotYetSupported) for the first part that is not usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="give the project folder with -d")
    agentic = is_agentic(folder, config)
    secrets = load_secrets(folder)
    rewards = load_rewards(folder, secrets=secrets)
    data = config.data
    rules = RowRules(
        dataset_type=config.dataset_type,
        known_rewards=rewards,
        # With the tools switched off, the names in the rows are neither used nor checked.
        known_tools=tools if agentic or not _has_tools(folder, config) else None,
        teachers=find_teachers(config),
        dockerfiles=[path.name.removeprefix("Dockerfile.") for path in folder.glob("Dockerfile.*")],
    )
    dataset = load_dataset(
        data.sources,
        rules,
        base_dir=folder,
        val_split=data.val_split,
        seed=config.seed,
        shuffle=data.shuffle,
    )
    return Project(
        folder=folder,
        dataset=dataset,
        rewards=rewards,
        secrets=secrets,
        agentic=agentic,
        redact=writing_redactor(secrets, config),
        redact_read=reading_redactor(secrets, config),
    )
