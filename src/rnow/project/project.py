"""A project folder as one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rnow.config import Config
from rnow.core.reward import RewardSpec
from rnow.errors import InputError, NotYetSupported
from rnow.project.dataset import Dataset, load_dataset
from rnow.project.secrets import load_secrets
from rnow.project.user_code import load_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What a folder holds beside its config: prompts, reward functions by name, and secrets by name."""

    folder: Path
    dataset: Dataset
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    has_tools: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be told about the data though it is no fault."""
        return self.dataset.warnings


def load_project(folder: Path, config: Config) -> Project:
    """Read and check the whole folder; nothing is written and no model is touched.

    Raises InputError (DataError, NotYetSupported) for the first part that is not usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="give the project folder with -d")
    has_tools = (folder / "tools.py").is_file()
    if has_tools and not _tools_are_off(config):
        raise NotYetSupported(
            "this version does not call the tools of tools.py",
            where="tools.py",
            fix="set teacher.agentic: false to train without them, or move tools.py away",
        )
    secrets = load_secrets(folder)
    rewards = load_rewards(folder)
    data = config.data
    dataset = load_dataset(
        data.sources,
        dataset_type=config.dataset_type,
        known_rewards=rewards,
        # With the tools switched off, the names in the rows are neither used nor checked.
        known_tools=None if has_tools else (),
        base_dir=folder,
        val_split=data.val_split,
        seed=config.seed,
        shuffle=data.shuffle,
    )
    return Project(
        folder=folder, dataset=dataset, rewards=rewards, secrets=secrets, has_tools=has_tools
    )


def _tools_are_off(config: Config) -> bool:
    return config.teacher is not None and config.teacher.agentic is False
