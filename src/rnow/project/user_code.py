"""The project's rewards.py: what it offers and what is wrong with it. It is imported in a child, never here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rnow.errors import InputError
from rnow.text.user_files import is_present
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import load_functions

METRIC_NAMES = frozenset({"mean", "failure_fraction"})


def load_rewards(
    folder: Path, *, secrets: Mapping[str, str] | None = None
) -> Mapping[str, FunctionInfo]:
    """Name -> reward function of ``folder/rewards.py``; empty when there is no such file.

    Rewards of helper modules that the file imports count too. Nothing is shared between two folders. Of ``secrets``, the
    file finds those that it names in its environment.

    Raises:
        InputError: the file cannot be imported, or a reward has the wrong parameters or a name twice.
    """
    path = folder / "rewards.py"
    if not is_present(path):
        return {}
    rewards = {info.name: info for info in load_functions(path, "rewards", secrets=secrets)}
    for info in rewards.values():
        if info.name in METRIC_NAMES:
            raise InputError(
                f'a reward cannot be named "{info.name}": reward/{info.name} is another metric',
                title="Invalid rewards",
                where=info.place,
                fix="rename the function",
            )
    return rewards
