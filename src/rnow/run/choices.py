"""What ``auto`` means: which implementation a config chooses on this machine, and its share of the card."""

from __future__ import annotations

from importlib.util import find_spec

from rnow.config import Config, TeacherSection
from rnow.models.loading import choose_device

OWN_CARD = 0.9
SHARED_CARD = 0.35
"""vLLM's share of a card that the trainer, and perhaps the teacher, use too."""


def uses_vllm(config: Config) -> bool:
    """Whether any part of the run talks to vLLM, whose logs need a place."""
    teacher = config.teacher
    return sampler_backend(config) == "vllm" or (
        teacher is not None and teacher_backend(teacher) == "vllm"
    )


def sampler_backend(config: Config) -> str:
    """``sampler.backend`` with ``auto`` decided: vllm on CUDA where it is installed, or where a url is given."""
    section = config.sampler
    if section.backend != "auto":
        return section.backend
    if section.url is not None:
        return "vllm"
    on_gpu = choose_device(config.model.device).type == "cuda"
    return "vllm" if on_gpu and find_spec("vllm") is not None else "transformers"


def teacher_backend(section: TeacherSection) -> str:
    """``teacher.backend`` with ``auto`` decided: a given url is a vLLM server, anything else is loaded here."""
    if section.backend != "auto":
        return section.backend
    return "transformers" if section.url is None else "vllm"


def student_share(config: Config) -> float:
    """``sampler.gpu_memory_utilization``, or its default. Spread over several cards, vLLM has them to itself."""
    section = config.sampler
    alone = section.tensor_parallel_size > 1
    return section.gpu_memory_utilization or (OWN_CARD if alone else SHARED_CARD)


def teacher_share(config: Config) -> float:
    """The same for a teacher that vLLM serves on this machine."""
    section = config.teacher
    assert section is not None
    alone = section.tensor_parallel_size > 1 or choose_device(section.device) != choose_device(
        config.model.device
    )
    return section.gpu_memory_utilization or (OWN_CARD if alone else SHARED_CARD)
