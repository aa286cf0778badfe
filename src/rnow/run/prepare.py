"""Everything about a run that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnow.config import Config, refuse_reserved
from rnow.errors import ConfigError, InputError, NotYetSupported
from rnow.models.ids import check_model_id
from rnow.models.resolve import ResolvedModel, resolve_model
from rnow.project.dataset import Dataset
from rnow.project.project import Project, load_project
from rnow.run.choices import sampler_backend, teacher_backend
from rnow.run.folder import RunFolder, choose_run_folder
from rnow.run.preflight import Preflight, run_preflight


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A project that passed its checks. ``num_steps`` is 0 when nothing is to be trained (``rnow test``)."""

    config: Config
    project: Project
    student: ResolvedModel
    teacher: ResolvedModel | None
    preflight: Preflight
    num_steps: int
    warn: Callable[..., None] = lambda *texts: None

    def secret(self, name: str) -> str | None:
        """A value of the project's ``.env``, else of the environment."""
        return self.project.secrets.get(name) or os.environ.get(name) or None

    @property
    def run_name(self) -> str:
        """``model.name``, else ``project_name``, else the folder's own name."""
        own = self.project.folder.resolve().name
        return self.config.model.name or self.config.project_name or own or "run"

    def run_folder(self, *, fresh: bool = False) -> RunFolder:
        """Where the run is kept; relative to the project."""
        base = self.project.folder / self.config.output_dir
        return choose_run_folder(base, self.run_name, fresh=fresh)


def prepare(config: Config, folder: Path, *, weights: bool, training: bool = True) -> Prepared:
    """Check ids, data, models and tokenizers, in the order of what is cheapest to be told.

    Args:
        folder: the project.
        weights: fetch the weights too (a run), or only what describes them (a check).
        training: the number of steps matters; False leaves batch sizes and the teacher out.

    Raises:
        InputError: the first thing that is wrong.
    """
    refuse_reserved(config)
    _check_served(config)
    _check_timeout(config)
    check_model_id(config.model.path, key="model.path", where="model.path", base_dir=folder)
    if config.teacher is not None:
        check_model_id(
            config.teacher.path, key="teacher.path", where="teacher.path", base_dir=folder
        )
    project = load_project(folder, config)
    dataset = project.dataset
    num_steps = 0
    if training:
        num_steps = count_steps(config, dataset)
        _check_evals(config, held_out=len(dataset.held_out))
    student = resolve_model(
        config.model.path,
        key="model.path",
        where="model.path",
        base_dir=folder,
        revision=config.model.revision,
        weights=weights,
        trust_remote_code=config.model.trust_remote_code,
    )
    teacher = None
    if training and config.teacher is not None:
        teacher = resolve_model(
            config.teacher.path,
            key="teacher.path",
            where="teacher.path",
            base_dir=folder,
            revision=config.teacher.revision,
            weights=weights and config.teacher.url is None,
            trust_remote_code=config.teacher.trust_remote_code,
        )
    preflight = run_preflight(config, [*dataset.prompts, *dataset.held_out], student, teacher)
    return Prepared(
        config=config,
        project=project,
        student=student,
        teacher=teacher,
        preflight=preflight,
        num_steps=num_steps,
    )


def _check_served(config: Config) -> None:
    """Settings of served models that exclude each other."""
    teacher = config.teacher
    for key, section in (("sampler", config.sampler), ("teacher", teacher)):
        if section is not None and section.url is not None and section.backend == "transformers":
            raise ConfigError(
                f"{key}.url names a vLLM server, but {key}.backend is transformers",
                where=f"{key}.backend",
                fix=f"set {key}.backend: vllm, or remove {key}.url",
            )
    served = teacher is not None and (teacher.backend == "vllm" or teacher.url is not None)
    if served and config.rollout.temperature != 1.0:
        raise ConfigError(
            f"a served teacher cannot be used at temperature {config.rollout.temperature:g}",
            where="rollout.temperature",
            why="its prompt log-probabilities cannot be tempered, so teacher and student would not be comparable",
            fix="set rollout.temperature: 1, or teacher.backend: transformers",
        )


# Settings that only one of two backends reads.
_VLLM_SAMPLER = (
    "mode", "served_model", "dtype", "quantization", "gpu_memory_utilization", "max_num_seqs",
    "tensor_parallel_size", "enforce_eager", "enable_prefix_caching",
)  # fmt: skip
_VLLM_TEACHER = (
    "served_model", "tensor_parallel_size", "gpu_memory_utilization", "max_num_batched_tokens",
)  # fmt: skip
_LOCAL_TEACHER = ("quantization", "dtype", "device", "device_map", "attn_implementation")


def unread_settings(config: Config) -> list[str]:
    """One warning for each section with settings that the chosen backend does not read."""
    unread = {}
    if sampler_backend(config) == "transformers":
        unread["sampler"] = _changed(config.sampler, _VLLM_SAMPLER), "sampler.backend transformers"
    else:
        unread["sampler"] = _changed(config.sampler, ("batch_memory_gb",)), "sampler.backend vllm"
    if config.teacher is not None:
        if teacher_backend(config.teacher) == "transformers":
            unread["teacher"] = (
                _changed(config.teacher, _VLLM_TEACHER),
                "teacher.backend transformers",
            )
        elif config.teacher.url is not None:
            names = (*_LOCAL_TEACHER, *_VLLM_TEACHER[1:])
            unread["teacher"] = _changed(config.teacher, names), "a teacher at teacher.url"
    return [
        f"{', '.join(f'{section}.{name}' for name in names)} has no effect with {what}"
        for section, (names, what) in unread.items()
        if names
    ]


def _changed(section: Any, names: Sequence[str]) -> list[str]:
    """Those settings of a section that are not at their default."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _check_timeout(config: Config) -> None:
    if config.rollout.rollout_timeout is not None and sampler_backend(config) == "transformers":
        raise NotYetSupported(
            "the embedded sampler cannot end one rollout before the others",
            where="rollout.rollout_timeout",
            why="it decodes all rollouts of a step together",
            fix="remove rollout.rollout_timeout and bound rollout.max_tokens, or use sampler.backend: vllm",
        )


def _check_evals(config: Config, *, held_out: int) -> None:
    if config.evals and not held_out:
        raise ConfigError(
            "evals are scheduled, but no prompts are held out to evaluate",
            where="evals",
            fix="set data.val_split, e.g. 0.05, or remove evals",
        )
    if config.data.val_split > 0 and not held_out:
        raise InputError(
            f"data.val_split {config.data.val_split} holds out no prompt of this dataset",
            where="data.val_split",
            fix="raise it, or set it to 0",
        )


def count_steps(config: Config, dataset: Dataset) -> int:
    """Steps of the run: those of all epochs, or ``trainer.max_steps`` if that is less.

    Raises:
        DataError: a batch is larger than the dataset.
    """
    trainer = config.trainer
    steps = dataset.num_steps(config.data.batch_size, trainer.num_epochs)
    return min(steps, trainer.max_steps or steps)
