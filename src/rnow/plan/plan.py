"""The plan of a run: what it will do, how large it is and whether it fits, before a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rnow.algorithm.head import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES
from rnow.config import Config
from rnow.errors import ConfigError
from rnow.models.loading import choose_device
from rnow.models.scoring import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS
from rnow.models.shape import ModelShape, measure
from rnow.plan.choices import DEFAULT_MAX_TOKENS, DEFAULT_MAX_TURNS
from rnow.plan.devices import DeviceInfo, cpu_memory, describe_device, free_disk
from rnow.plan.memory import (
    ENGINE_WORK,
    MemoryPart,
    MemorySettings,
    ModelMemory,
    Residence,
    Stage,
    engine_least,
    least,
    memory_parts,
    peak,
    peak_in_turns,
    savings,
    with_nf4,
)
from rnow.plan.prepare import Prepared
from rnow.plan.roles import (
    STUDENT,
    TEACHER,
    Role,
    RunModel,
    dtype_name,
    engine_share,
    roles_of,
    sharers,
)
from rnow.sampling.transformers import CPU_BATCH_BYTES, GPU_BATCH_FRACTION
from rnow.training.residency import Part

MOMENTS_AND_ADAPTER = 3
MAX_ADVICE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model of the run. ``weights_bytes`` is the size of its files, ``dtype`` that of unquantised numbers."""

    path: str
    revision: str | None
    architecture: str
    parameters: int
    weights_bytes: int
    dtype: str
    quantization: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What one device has to hold. ``peak_bytes`` is an estimate at the longest sequences; ``advice`` names settings
    that lower it, with the peak each gives.

    Attributes:
        residency: whether all of it is there at once or the parts take turns.
        least_bytes: what is held however short the sequences are.
        peaks: of both, where there is a choice.
        lacking: vLLMs whose share of the card is too small for them to start.
        with_nf4_teacher: the peak of all at once with a 4-bit teacher, where the teacher is none and there is a choice.
    """

    info: DeviceInfo
    parts: tuple[MemoryPart, ...]
    peak_bytes: int
    peak_stage: Stage
    advice: tuple[str, ...]
    residency: Residence = "resident"
    least_bytes: int = 0
    peaks: Mapping[Residence, int] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    with_nf4_teacher: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the free memory."""
        return self.peak_bytes <= self.info.free_bytes and not self.lacking

    @property
    def hopeless(self) -> bool:
        """Whether even the least is too much; otherwise shorter answers than the longest may fit."""
        return self.least_bytes > self.info.free_bytes or bool(self.lacking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Counts are totals of the run unless named per step; sizes are bytes.

    ``models`` is by role, the student first; ``completion_tokens`` is the longest answer, ``max_total_tokens`` what all
    answers together cannot exceed.
    """

    dataset_type: str
    tools: tuple[str, ...]
    max_turns: int
    run_dir: str
    models: Mapping[str, ModelPlan]
    prompts: int
    held_out: int
    epochs: int
    steps: int
    prompts_per_step: int
    rollouts_per_prompt: int
    rollouts: int
    updates: int
    window: int
    longest_prompt: int
    completion_tokens: int
    max_total_tokens: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]
    trainable_parameters: int
    devices: tuple[DevicePlan, ...]
    checkpoint_bytes: int
    checkpoints_bytes: int
    disk_free_bytes: int
    notices: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice by the estimate."""
        return self.disk_suffices and all(device.fits for device in self.devices)

    @property
    def disk_suffices(self) -> bool:
        """Whether the checkpoints kept at once fit the disk."""
        return self.checkpoints_bytes <= self.disk_free_bytes

    def to_dict(self) -> dict[str, object]:
        """Plain values for ``--json``, verdicts included; each model under the name of its role."""
        values = asdict(self)
        for device, plain in zip(self.devices, values["devices"], strict=True):
            plain["fits"] = device.fits
            for part in plain["parts"]:
                del part["kind"]
        return {TEACHER: None, **values.pop("models"), **values, "fits": self.fits}


def build_plan(
    prepared: Prepared, *, run_dir: Path, devices: Mapping[str, DeviceInfo] | None = None
) -> Plan:
    """Work out what ``rnow run`` would do.

    Args:
        run_dir: where the run folder will be; need not exist.
        devices: memory of the devices by name (``cpu``, ``cuda:0``); looked up when not given.

    Raises:
        ModelError: a configuration that is no causal LM, or a device that does not exist.
        ConfigError: as ``may_take_turns``.
    """
    config, dataset, rendered = prepared.config, prepared.project.dataset, prepared.rendered
    data, trainer = config.data, config.trainer
    rollouts = prepared.num_steps * data.batch_size * data.group_size
    completion = _completion_tokens(prepared)
    shapes = {
        name: measure(model.resolved, trust_remote_code=model.role.section.trust_remote_code)
        for name, model in prepared.models.items()
    }
    models = {name: _model_plan(model, shapes[name]) for name, model in prepared.models.items()}
    turns = may_take_turns(config)
    plans = _device_plans(prepared, models, shapes, turns, completion, devices or {})
    adapter = shapes[STUDENT].lora_parameters(config.model.qlora_rank)
    checkpoint = adapter * 4 * MOMENTS_AND_ADAPTER
    return Plan(
        dataset_type=config.dataset_type,
        tools=tuple(prepared.tools),
        max_turns=(config.rollout.max_turns or DEFAULT_MAX_TURNS) if prepared.tools else 1,
        run_dir=str(run_dir),
        models=models,
        prompts=len(dataset.prompts),
        held_out=len(dataset.held_out),
        epochs=trainer.num_epochs,
        steps=prepared.num_steps,
        prompts_per_step=data.batch_size,
        rollouts_per_prompt=data.group_size,
        rollouts=rollouts,
        updates=prepared.num_steps * trainer.updates_per_batch,
        window=rendered.window,
        longest_prompt=rendered.longest_prompt,
        completion_tokens=completion,
        max_total_tokens=rollouts * completion,
        vocabulary=rendered.vocabulary,
        stop_ids=rendered.stop_ids,
        stop_texts=tuple(rendered.tokenizer.decode([token]) for token in rendered.stop_ids),
        trainable_parameters=adapter,
        devices=plans,
        checkpoint_bytes=checkpoint,
        # One more than is kept: the next is complete before the oldest goes.
        checkpoints_bytes=checkpoint * (trainer.keep_checkpoints + 1),
        disk_free_bytes=free_disk(run_dir),
        notices=prepared.notices,
        warnings=(*dataset.warnings, *rendered.warnings, *_host_warnings(plans, turns)),
    )


def may_take_turns(config: Config) -> frozenset[Part]:
    """The parts that could take turns on the student's card; none where there is nothing to share.

    Raises:
        ConfigError: turns are asked for on a CPU.
    """
    if choose_device(config.model.device).type != "cuda":
        if config.residency == "time_shared":
            raise ConfigError(
                "sampler, teacher and trainer can take turns on a CUDA card only",
                where="residency",
                why="on a CPU the sleeping ones would wait in the very memory they leave, and vLLM has no sleep mode",
                fix="set residency: auto",
            )
        return frozenset()
    parts = sharers(roles_of(config))
    return parts if len(parts) > 1 and config.residency != "resident" else frozenset()


def taking_turns(prepared: Prepared, run_dir: Path) -> frozenset[Part]:
    """The parts that take turns in this run, by its config and, with ``residency: auto``, by what fits the card now.

    Raises:
        ConfigError: as ``may_take_turns``.
    """
    turns = may_take_turns(prepared.config)
    if not turns or prepared.config.residency == "time_shared":
        return turns
    plan = build_plan(prepared, run_dir=run_dir)
    return turns if plan.devices[0].residency == "time_shared" else frozenset()


def _completion_tokens(prepared: Prepared) -> int:
    """The longest answer. A conversation with tools may fill the window."""
    lengths = map(len, prepared.rendered.prompt_token_ids.values())
    room = prepared.rendered.window - min(lengths, default=0)
    cap = prepared.config.rollout.max_tokens or DEFAULT_MAX_TOKENS
    return room if prepared.tools else min(cap, room)


def _placement(model: RunModel) -> str:
    """One name per device, so that two models on one card are added up: every device map on a machine with a single GPU is
    that GPU."""
    import torch

    if model.role.device_map is None:
        return model.role.card
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        return f"device_map {model.role.device_map}"
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _model_plan(model: RunModel, shape: ModelShape) -> ModelPlan:
    role, resolved = model.role, model.resolved
    return ModelPlan(
        path=resolved.path,
        revision=resolved.revision,
        architecture=shape.architecture,
        parameters=shape.parameters,
        weights_bytes=resolved.weights_bytes,
        dtype=dtype_name(role.dtype),
        quantization=role.quantization,
        device=_placement(model),
    )


def _device_plans(
    prepared: Prepared,
    models: Mapping[str, ModelPlan],
    shapes: Mapping[str, ModelShape],
    turns: frozenset[Part],
    completion: int,
    known: Mapping[str, DeviceInfo],
) -> tuple[DevicePlan, ...]:
    """One plan per device, that of the student first: only there is a choice between all at once and taking turns."""
    owners: dict[str, list[str]] = {}
    for name, model in models.items():
        owners.setdefault(model.device, []).append(name)
    infos = {device: known.get(device) or describe_device(device) for device in owners}
    shared = models[STUDENT].device
    held, info = owners[shared], infos[shared]
    settings = _settings(prepared, shapes, info, completion, time_shared=False)
    first, *others = (_device_plan(settings, infos[device], owners[device]) for device in owners)
    if turns:
        in_turns = _settings(prepared, shapes, info, completion, time_shared=True)
        alternative = _device_plan(in_turns, info, held, turns)
        preferred = prepared.config.residency == "time_shared" or not first.fits
        first = replace(
            alternative if preferred else first,
            peaks={"resident": first.peak_bytes, "time_shared": alternative.peak_bytes},
            with_nf4_teacher=_with_nf4_teachers(settings, held),
        )
    return (first, *others)


def _settings(
    prepared: Prepared,
    shapes: Mapping[str, ModelShape],
    device: DeviceInfo,
    completion: int,
    *,
    time_shared: bool,
) -> MemorySettings:
    """The same defaults as the parts themselves take. ``device`` is the student's."""
    config, rendered = prepared.config, prepared.rendered
    on_gpu = device.on_gpu
    cache = CPU_BATCH_BYTES if not on_gpu else int(device.total_bytes * GPU_BATCH_FRACTION)
    if config.sampler.batch_memory_gb is not None:
        cache = int(config.sampler.batch_memory_gb * 1e9)
    tokens = config.trainer.micro_batch_tokens
    checkpointing = config.trainer.gradient_checkpointing
    return MemorySettings(
        models={
            name: _model_memory(
                model.role, shapes[name], prepared.student.role, device, time_shared=time_shared
            )
            for name, model in prepared.models.items()
        },
        rank=config.model.qlora_rank,
        rollouts=config.data.batch_size * config.data.group_size,
        prompt_tokens=rendered.longest_prompt,
        completion_tokens=completion,
        window=rendered.window,
        micro_batch_tokens=tokens or (GPU_MICRO_BATCH_TOKENS if on_gpu else CPU_MICRO_BATCH_TOKENS),
        gradient_checkpointing=on_gpu if checkpointing == "auto" else checkpointing,
        cache_budget=cache,
        head_buffer=GPU_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES,
    )


def _model_memory(
    role: Role, shape: ModelShape, student: Role, device: DeviceInfo, *, time_shared: bool
) -> ModelMemory:
    memory = ModelMemory(
        role=role, shape=shape, width=role.dtype.itemsize, quantization=role.quantization
    )
    if role.serving.url is not None:
        return replace(memory, engine=0)
    if role.backend != "vllm":
        return memory
    if device.on_gpu:
        share = engine_share(role, student, time_shared=time_shared)
        return replace(memory, engine=round(share * device.total_bytes))
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")) * 2**30
    return replace(memory, engine=round(memory.weight_bytes) + cache + ENGINE_WORK)


def _with_nf4_teachers(settings: MemorySettings, held: Collection[str]) -> int | None:
    """The peak with every teacher on the device in 4 bits; None where there is none to change."""
    changed = settings
    for role in held:
        model = settings.models[role]
        # A vLLM takes its share of the card, however it stores its weights.
        if role != STUDENT and model.quantization != "nf4" and model.engine is None:
            changed = with_nf4(changed, role)
    if changed is settings:
        return None
    return peak([part for part in memory_parts(changed) if part.model in held])[0]


def _device_plan(
    settings: MemorySettings,
    info: DeviceInfo,
    held: Sequence[str],
    turns: frozenset[Part] = frozenset(),
) -> DevicePlan:
    parts = tuple(part for part in memory_parts(settings) if part.model in held)
    most, stage = peak_in_turns(parts, turns)
    advice: tuple[str, ...] = ()
    if most > info.free_bytes:
        advice = tuple(
            f"{setting}  (peak {format_bytes(after)})"
            for setting, after in savings(settings, held, turns)[:MAX_ADVICE]
        )
    return DevicePlan(
        info=info,
        parts=parts,
        peak_bytes=most,
        peak_stage=stage,
        advice=advice,
        residency="time_shared" if turns else "resident",
        least_bytes=least(parts, turns),
        lacking=_lacking(settings, held) if info.on_gpu else (),
    )


def _lacking(settings: MemorySettings, held: Sequence[str]) -> tuple[str, ...]:
    """One line for each vLLM that would not start, for want of memory of its own."""
    lines = []
    for model in map(settings.models.__getitem__, held):
        total = model.engine
        if total and total < (needed := engine_least(model, settings)):
            lines.append(
                f"{model.role.serving_key}.gpu_memory_utilization gives vLLM {format_bytes(total)}; its weights and one sequence of "
                f"{settings.window:,} tokens need {format_bytes(needed)}"
            )
    return tuple(lines)


def _host_warnings(plans: tuple[DevicePlan, ...], turns: frozenset[Part]) -> tuple[str, ...]:
    """What sleeps must find room in main memory."""
    plan = plans[0]
    if plan.residency != "time_shared":
        return ()
    kept = [part for part in plan.parts if part.owner in turns and part.stage == "always"]
    needed = sum(part.bytes for part in kept if part.kind != "engine cache")
    free = cpu_memory()[1]
    if needed <= free:
        return ()
    sizes = f"{format_bytes(needed)} of main memory, and {format_bytes(free)}"
    return (f"the parts that sleep need up to {sizes} are free",)


def format_bytes(amount: float) -> str:
    """``1.2 GB``, ``34 MB``: powers of ten, as disks and cards are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            value = amount / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:,.0f} {unit}"
    return f"{amount:.0f} B"
