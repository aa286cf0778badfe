"""What ``auto`` means: which implementation a config chooses on this machine, and its share of the card."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from rnow.config import Config, TeacherSection
from rnow.models.loading import choose_device, choose_dtype
from rnow.training.residency import Part

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_TOKENS = 4096
"""Cap on one answer."""
DEFAULT_MAX_TURNS = 10
"""Turns of a rollout with tools."""
OWN_CARD = 0.9
SHARED_CARD = 0.35
"""vLLM's share of a card that the trainer, and perhaps the teacher, use too."""
CARD_IN_TURNS = 0.8
"""vLLM's share of a card that it has in turns with them: what sleeps leaves a little behind."""


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


def student_share(config: Config, *, time_shared: bool = False) -> float:
    """``sampler.gpu_memory_utilization``, or its default. Spread over several cards, vLLM has them to itself."""
    section = config.sampler
    alone = section.tensor_parallel_size > 1
    return section.gpu_memory_utilization or _default_share(alone=alone, time_shared=time_shared)


def teacher_share(config: Config, *, time_shared: bool = False) -> float:
    """The same for a teacher that vLLM serves on this machine."""
    section = config.teacher
    assert section is not None
    alone = section.tensor_parallel_size > 1 or not _same_card(config)
    return section.gpu_memory_utilization or _default_share(alone=alone, time_shared=time_shared)


def _same_card(config: Config) -> bool:
    """Whether teacher and student are on one device; ``cuda`` is ``cuda:0``."""
    assert config.teacher is not None
    names = [str(choose_device(part.device)) for part in (config.model, config.teacher)]
    return len({"cuda:0" if name == "cuda" else name for name in names}) == 1


def _default_share(*, alone: bool, time_shared: bool) -> float:
    if alone:
        return OWN_CARD
    return CARD_IN_TURNS if time_shared else SHARED_CARD


def sharers(config: Config) -> frozenset[Part]:
    """The parts that hold the student's card and could leave it: the trainer, and what shares the card with it.

    An embedded sampler is not one, since it draws with the trainer's weights; nor is a model that somebody else serves, that
    has another device or that is spread over several.
    """
    found: set[Part] = {"trainer"}
    sampler, teacher = config.sampler, config.teacher
    if sampler_backend(config) == "vllm" and not sampler.url and sampler.tensor_parallel_size == 1:
        found.add("sampler")
    if teacher is not None and not teacher.url and not teacher.device_map:
        spread = teacher_backend(teacher) == "vllm" and teacher.tensor_parallel_size > 1
        if _same_card(config) and not spread:
            found.add("teacher")
    return frozenset(found)


def student_quantization(config: Config, device: torch.device) -> Literal["nf4", "none"]:
    """``model.quantization`` with ``auto`` decided."""
    chosen = config.model.quantization
    if chosen == "auto":
        return "nf4" if device.type == "cuda" else "none"
    return chosen


def sampler_format(config: Config) -> tuple[Literal["nf4", "none"], str]:
    """Quantization and dtype in which vLLM is to hold the student's base: the trainer's, unless the config says otherwise."""
    section, device = config.sampler, choose_device(config.model.device)
    quantization = section.quantization
    if quantization == "auto":
        quantization = student_quantization(config, device)
    return quantization, dtype_name(
        section.dtype if section.dtype != "auto" else config.model.dtype, device
    )


def dtype_name(name: str, device: torch.device) -> str:
    """A dtype of the config with ``auto`` decided, as vLLM spells it."""
    return str(choose_dtype(name, device)).removeprefix("torch.")
