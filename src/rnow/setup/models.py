"""Loading the models of a run as its config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnow.config import Config, ModelSection, TeacherSection
from rnow.models.loading import CausalLM, Quantization, choose_device, choose_dtype, load_causal_lm
from rnow.models.resolve import ResolvedModel
from rnow.plan.choices import student_quantization

if TYPE_CHECKING:
    import torch


def load_student(config: Config, resolved: ResolvedModel, vocabulary: int) -> CausalLM:
    """The student's frozen base."""
    device = choose_device(config.model.device)
    quantization = student_quantization(config, device)
    return _load(config.model, resolved, vocabulary, device, quantization, None)


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
