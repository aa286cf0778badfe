"""Which implementation serves a config on this machine: what ``backend: auto`` means, and limits with defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rnow.config import Config, TeacherSection
from rnow.config.estimator import kl_estimator
from rnow.config.schema import Control
from rnow.config.teachers import any_served, control_of, teacher_sections
from rnow.models.loading import choose_device
from rnow.models.shape import ModelShape
from rnow.serving.server import VISIBLE
from rnow.text.install import install_command

SMALL_TEACHER = 10**9
"""Parameters up to which a teacher that transformers runs answers the held-out prompts too."""
LAYER_SECONDS = 1.5e-3
"""Of one layer in one step of transformers' decoding on a card: bound by launching kernels, not by the numbers."""
DRIVER = Path("/proc/driver/nvidia/version")
"""There where NVIDIA's driver is loaded."""
DEFAULT_MAX_TOKENS = 4096
"""Cap on one answer."""
DEFAULT_MAX_TURNS = 10
"""Turns of a rollout with tools."""


def sampler_backend(config: Config) -> Literal["transformers", "vllm"]:
    """``sampler.backend`` with ``auto`` decided: vllm on CUDA where it is installed, or where a url is given. Where nothing is
    sampled it is transformers, which trains."""
    section = config.sampler
    if not config.on_policy:
        return "transformers"
    if section.backend != "auto":
        return section.backend
    if section.url is not None:
        return "vllm"
    on_gpu = choose_device(config.model.device, key="model.device").type == "cuda"
    return "vllm" if on_gpu and find_spec("vllm") is not None else "transformers"


def teacher_answers(config: Config, shape: ModelShape, *, served: bool) -> bool:
    """``evaluation.teacher`` with ``auto`` decided: whether a teacher, of this shape, answers the held-out prompts too.
    ``served``: by a vLLM."""
    asked = config.evaluation.teacher
    if asked != "auto":
        return asked
    return served or (shape.sampled and shape.parameters <= SMALL_TEACHER)


CONTROLS: Mapping[Control, str] = {
    "shuffled": "each answer is judged by what the teacher says of another one",
    "none": "no teacher is asked, unlikely tokens are only made less likely",
}
"""What each ``teacher.control`` does."""


def describe_signal(config: Config) -> str:
    """What the teacher says of each token, in a line; empty where nobody is asked."""
    algorithm = config.algorithm
    taught = any(teacher_sections(config))
    if not taught and (config.dataset_type != "rl" or algorithm.kl_penalty_coef == 0):
        return ""
    if (control := control_of(config)) is not None:
        return f"CONTROL {control}: {CONTROLS[control]}"
    estimator = kl_estimator(config)
    if estimator == "sampled":
        return "sampled: the teacher's log-probability of each sampled token"
    kind = "jsd" if algorithm.divergence == "jsd" else f"{algorithm.divergence} KL"
    if estimator == "exact":
        return f"exact: {kind} over the teacher's whole distribution"
    return f"topk: {kind} over its {algorithm.teacher_top_k} likeliest tokens and a bucket for the rest"


def reads_hidden_states(config: Config) -> bool:
    """Whether the objective asks the teacher for hidden states, and its head stays where the update is."""
    if config.algorithm.kl_baseline == "optimal":
        return not any_served(config)
    return kl_estimator(config) == "exact"


def control_warning(config: Config) -> list[str]:
    """That a run is a control and no training of use; empty where it is none."""
    control = control_of(config)
    if control is None:
        return []
    return [
        f"this run is a control (teacher.control: {control}): {CONTROLS[control]}. Its adapter is no distilled student, and its "
        "teacher_kl while training is not the KL to the teacher; that of evaluations is"
    ]


def slow_paths(config: Config) -> list[str]:
    """What this machine could do faster and does not, with the reason; one sentence each."""
    device, found = choose_device(config.model.device, key="model.device"), []
    sections = [section for _, section in teacher_sections(config) if not section.own_base]
    here = [section for section in sections if section.url is None]
    if device.type == "cpu" and "auto" in (section.device for section in (config.model, *here)):
        why = unusable_gpu()
        if why is not None:
            found.append(f"this machine has a GPU, and the run is on the CPU: {why}")
    chosen = config.on_policy and config.sampler.backend == "auto"
    embedded = chosen and sampler_backend(config) == "transformers"
    if device.type == "cuda" and embedded:
        found.append(
            "the student samples with transformers, several times slower than vLLM, since vLLM is not installed: "
            f"{install_command('vllm')}, or set sampler.backend: transformers if that is meant"
        )
    return found


def missing_trackers(config: Config) -> list[str]:
    """What to install for the trackers that the config names; a run goes on without those that are not there."""
    return [
        f"trackers: {name} is not installed: {install_command(name)}"
        for name in config.tracked_by
        if find_spec(name) is None
    ]


def unusable_gpu() -> str | None:
    """Why torch does not use an NVIDIA card that this machine has; None without one, and where the user hides it."""
    import torch

    if not DRIVER.exists() or torch.cuda.is_available() or os.environ.get(VISIBLE) in ("", "-1"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it"
    return f"torch {torch.__version__} does not find it; its CUDA {torch.version.cuda} may need a newer NVIDIA driver"


def scores_early(config: Config) -> bool:
    """Whether the teacher is asked for each rollout as soon as it is finished: the one teacher is behind a server, which has
    machines of its own, and is not the server that samples."""
    sections = [section for _, section in teacher_sections(config)]
    if len(sections) != 1 or control_of(config) is not None:
        return False
    (teacher,) = sections
    samples = (config.sampler.url or "").rstrip("/")
    return teacher.url is not None and teacher.url.rstrip("/") != samples


def teacher_backend(section: TeacherSection) -> Literal["transformers", "vllm"]:
    """``teacher.backend`` with ``auto`` decided: a given url is a vLLM server, anything else is loaded here."""
    if section.backend != "auto":
        return section.backend
    return "transformers" if section.url is None else "vllm"
