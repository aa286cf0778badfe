"""Rules that hold between keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rnow.config.problems import Problem

if TYPE_CHECKING:
    from rnow.config.schema import Schema

RESERVED_DATASETS = frozenset({"k3"})
RESERVED_EVALS = frozenset({"before", "after", "teacher"})


def find_contradictions(config: Schema) -> Iterator[Problem]:
    """Every pair of settings that cannot go together."""
    distill = config.dataset_type == "distill"
    if distill and config.teacher is None:
        yield Problem(
            path=("teacher", "path"),
            message="dataset_type distill needs a teacher",
            hint="add a teacher section with path: <HuggingFace id or local folder>",
        )
    if not distill and config.teacher is not None:
        yield Problem(
            path=("teacher",),
            message=f"a teacher is only used with dataset_type distill, not {config.dataset_type}",
            hint="remove the teacher section, or set dataset_type: distill",
        )
    teacher = config.teacher
    if teacher is not None and teacher.url is None:
        # auto loads the teacher with transformers where no url is given.
        engine = "vllm" if teacher.backend == "vllm" else "transformers"
        if teacher.quantization == ("int8" if engine == "vllm" else "fp8"):
            other = "transformers" if engine == "vllm" else "vllm"
            yield Problem(
                path=("teacher", "quantization"),
                message=f"{engine} does not quantise to {teacher.quantization} while it loads",
                hint=f"set teacher.backend: {other}, or teacher.quantization: nf4",
            )
    algorithm = config.algorithm
    coefficients = (algorithm.kl_penalty_coef, algorithm.reward_coef)
    sampled = config.dataset_type in ("distill", "rl") and algorithm.kl_estimator == "sampled"
    if sampled and coefficients == (0, 0):
        yield Problem(
            path=("algorithm", "kl_penalty_coef"),
            message="kl_penalty_coef and reward_coef are both 0, so nothing would be learned",
            hint="set kl_penalty_coef above 0 to follow the teacher, or reward_coef above 0 to follow the rewards",
        )
    names = [source.name for source in config.data.sources]
    for index, name in enumerate(names):
        path = ("data", "train_file", index, "name")
        if name in names[:index]:
            message = f"two datasets are named {name}"
            yield Problem(path=path, message=message, hint="give each its own name")
        elif name in RESERVED_DATASETS:
            message = f"a dataset cannot be named {name}: teacher_kl/{name} is another metric"
            yield Problem(path=path, message=message, hint="choose another name")
    names = [entry.name or f"eval_{index}" for index, entry in enumerate(config.evals)]
    for index, name in enumerate(names):
        if name in RESERVED_EVALS or name in names[:index]:
            why = "is one of rnow's own" if name in RESERVED_EVALS else "is taken"
            yield Problem(
                path=("evals", index, "name"),
                message=f"the evaluation name {name} {why}",
                hint="choose another name",
            )
