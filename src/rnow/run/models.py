"""Loading the models of a run as its config says."""

from __future__ import annotations

from typing import Literal

import torch

from rnow.config import Config, ModelSection, TeacherSection
from rnow.models.loading import CausalLM, Quantization, choose_device, choose_dtype, load_causal_lm
from rnow.models.resolve import ResolvedModel


def load_student(config: Config, resolved: ResolvedModel, vocabulary: int) -> CausalLM:
    """The student's frozen base."""
    device = choose_device(config.model.device)
    quantization = student_quantization(config, device)
    return _load(config.model, resolved, vocabulary, device, quantization, None)


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


def load_teacher_model(
    section: TeacherSection, resolved: ResolvedModel, vocabulary: int
) -> CausalLM:
    """The teacher, with the head cut to the ids that both models know."""
    device = choose_device(section.device)
    return _load(section, resolved, vocabulary, device, section.quantization, section.device_map)


def _load(
    section: ModelSection | TeacherSection,
    resolved: ResolvedModel,
    vocabulary: int,
    device: torch.device,
    quantization: Quantization,
    device_map: str | None,
) -> CausalLM:
    return load_causal_lm(
        resolved.local_dir,
        vocabulary=vocabulary,
        dtype=choose_dtype(section.dtype, device),
        device=device,
        quantization=quantization,
        device_map=device_map,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )
