"""Teachers whose layers are read from their files while they score: which are, which could be, and what that costs a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rnow.config import Config
from rnow.models.families import not_streamed
from rnow.models.shape import ModelShape
from rnow.plan.roles import Models, RunModel, teachers_of

BUS, COPY, DISK = 25e9, 5e9, 3e9
"""Bytes a second: main memory to a card over PCIe 4 x16, the page cache to other memory by one thread, an NVMe disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What streaming a teacher means for a step.

    Attributes:
        bytes: of its layers, as they reach the device.
        rate: bytes a second at which they come.
        source: from where.
        seconds: of a step, hidden where computing takes longer.
    """

    bytes: int
    rate: float
    source: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"streamed: {self.bytes / 1e9:.3g} GB a step from {self.source}, {self.seconds:.2g} s at "
            f"{self.rate / 1e9:.0f} GB/s"
        )


def describe_streaming(model: RunModel, shape: ModelShape, *, host_free: int) -> Streaming:
    """What a step of a streamed teacher reads, and how fast.

    Args:
        host_free: bytes of main memory that the kernel can keep files in.
    """
    width, on_gpu = model.role.dtype.itemsize, model.role.on_gpu
    cached = shape.parameters * width <= host_free
    rate = (BUS if on_gpu else COPY) if cached else DISK
    size = shape.layered * width
    source = "main memory" if cached else "the disk"
    return Streaming(bytes=size, rate=rate, source=source, seconds=size / rate)


def asked_to_stream(models: Models, shapes: Mapping[str, ModelShape]) -> frozenset[str]:
    """The teachers, by role, that the config says are streamed. One that is the student's own base is not loaded at all.

    Raises:
        ModelError: one cannot be.
    """
    found = set()
    for model in teachers_of(models):
        role = model.role
        if role.residency != "streamed" or model.own_base:
            continue
        if why := _why_not(model, shapes[role.name]):
            raise not_streamed(role.section.path, why, key=role.key)
        found.add(role.name)
    return frozenset(found)


def could_stream(
    config: Config, models: Models, shapes: Mapping[str, ModelShape]
) -> frozenset[str]:
    """The teachers, by role, that can be streamed, whatever the config says: where they need not write answers, too."""
    if config.evaluation.teacher is True:
        return frozenset()
    return frozenset(
        model.role.name
        for model in teachers_of(models)
        if not model.own_base and _why_not(model, shapes[model.role.name]) is None
    )


def _why_not(model: RunModel, shape: ModelShape) -> str | None:
    """Why a model cannot be streamed; None where it can. That of settings is in ``config.checks``, too."""
    role = model.role
    if role.backend != "transformers" or role.device_map or role.section.trust_remote_code:
        return "it is held by a vLLM, spread over several devices, or runs code of its own"
    if model.quantization != "none":
        return "its weights are quantised"
    return shape.unstreamed
