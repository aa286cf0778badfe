"""Which implementation serves a config on this machine: what ``backend: auto`` means, and limits with defaults."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from rnow.config import Config, TeacherSection
from rnow.models.loading import choose_device

DEFAULT_MAX_TOKENS = 4096
"""Cap on one answer."""
DEFAULT_MAX_TURNS = 10
"""Turns of a rollout with tools."""


def uses_vllm(config: Config) -> bool:
    """Whether any part of the run talks to vLLM, whose logs need a place."""
    teacher = config.teacher
    backends = sampler_backend(config), teacher and teacher_backend(teacher)
    return "vllm" in backends


def sampler_backend(config: Config) -> Literal["transformers", "vllm"]:
    """``sampler.backend`` with ``auto`` decided: vllm on CUDA where it is installed, or where a url is given."""
    section = config.sampler
    if section.backend != "auto":
        return section.backend
    if section.url is not None:
        return "vllm"
    on_gpu = choose_device(config.model.device).type == "cuda"
    return "vllm" if on_gpu and find_spec("vllm") is not None else "transformers"


def teacher_backend(section: TeacherSection) -> Literal["transformers", "vllm"]:
    """``teacher.backend`` with ``auto`` decided: a given url is a vLLM server, anything else is loaded here."""
    if section.backend != "auto":
        return section.backend
    return "transformers" if section.url is None else "vllm"
