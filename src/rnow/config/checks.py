"""Rules that hold between keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnow.config.problems import Problem

if TYPE_CHECKING:
    from rnow.config.load import Config

RESERVED_DATASETS = frozenset({"k3"})
RESERVED_EVALS = frozenset({"before", "after", "teacher"})


def find_contradictions(config: Config) -> list[Problem]:
    """Every pair of settings that cannot go together."""
    problems: list[Problem] = []
    if config.dataset_type == "distill" and config.teacher is None:
        problems.append(
            Problem(
                path=("teacher", "path"),
                message="dataset_type distill needs a teacher",
                hint="add a teacher section with path: <HuggingFace id or local folder>",
            )
        )
    if config.dataset_type != "distill" and config.teacher is not None:
        problems.append(
            Problem(
                path=("teacher",),
                message=f"a teacher is only used with dataset_type distill, not {config.dataset_type}",
                hint="remove the teacher section, or set dataset_type: distill",
            )
        )
    algorithm = config.algorithm
    if (
        config.dataset_type in ("distill", "rl")
        and algorithm.kl_penalty_coef == 0
        and algorithm.reward_coef == 0
    ):
        problems.append(
            Problem(
                path=("algorithm", "kl_penalty_coef"),
                message="kl_penalty_coef and reward_coef are both 0, so nothing would be learned",
                hint="set kl_penalty_coef above 0 to follow the teacher, or reward_coef above 0 to follow the rewards",
            )
        )
    names = [source.name for source in config.data.sources]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.append(
                Problem(
                    path=("data", "train_file", index, "name"),
                    message=f"two datasets are named {name}",
                    hint="give each its own name",
                )
            )
        elif name in RESERVED_DATASETS:
            problems.append(
                Problem(
                    path=("data", "train_file", index, "name"),
                    message=f"a dataset cannot be named {name}: teacher_kl/{name} is another metric",
                    hint="choose another name",
                )
            )
    return problems + _evaluation_names(config)


def _evaluation_names(config: Config) -> list[Problem]:
    problems = []
    names = [entry.name or f"eval_{index}" for index, entry in enumerate(config.evals)]
    for index, name in enumerate(names):
        if name in RESERVED_EVALS or name in names[:index]:
            why = "is one of rnow's own" if name in RESERVED_EVALS else "is taken"
            problems.append(
                Problem(
                    path=("evals", index, "name"),
                    message=f"the evaluation name {name} {why}",
                    hint="choose another name",
                )
            )
    return problems
