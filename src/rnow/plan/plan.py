"""The plan of a run: what it will do, how large it is and whether it fits, before a weight is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rnow.errors import ConfigError
from rnow.models.resolve import ResolvedModel
from rnow.models.shape import measure
from rnow.plan.memory import (
    ENGINE_WORK,
    MemoryPart,
    MemorySettings,
    ModelMemory,
    Quantization,
    Residence,
    Stage,
    engine_least,
    least,
    memory_parts,
    peak,
    peak_in_turns,
    savings,
)
from rnow.plan.rendered import Preflight
from rnow.training.residency import Part

if TYPE_CHECKING:
    from rnow.config import Config
    from rnow.plan.prepare import Prepared
    from rnow.project import Dataset

_KINDS: tuple[Residence, ...] = ("resident", "time_shared")
_NOT_KEPT = ("vLLM KV cache", "vLLM buffers")
MOMENTS_AND_ADAPTER = 3
MAX_ADVICE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device and its memory in bytes; ``free_bytes`` is what this process could still take."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int


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

    ``completion_tokens`` is the longest answer, ``max_total_tokens`` what all answers together cannot exceed.
    """

    dataset_type: str
    tools: tuple[str, ...]
    max_turns: int
    run_dir: str
    student: ModelPlan
    teacher: ModelPlan | None
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``, verdicts included."""
        values = asdict(self)
        for device, plain in zip(self.devices, values["devices"], strict=True):
            plain["fits"] = device.fits
        return {**values, "fits": self.fits}


def build_plan(
    config: Config,
    dataset: Dataset,
    student: ResolvedModel,
    teacher: ResolvedModel | None,
    preflight: Preflight,
    *,
    run_dir: Path,
    tools: Sequence[str] = (),
    notices: Sequence[str] = (),
    devices: Mapping[str, DeviceInfo] | None = None,
) -> Plan:
    """Work out what ``rnow run`` would do.

    Args:
        run_dir: where the run folder will be; need not exist.
        tools: names of what the student can call. A conversation with tools may fill the window.
        notices: what should be said besides.
        devices: memory of the devices by name (``cpu``, ``cuda:0``); looked up when not given.

    Raises:
        ModelError: a configuration that is no causal LM, or a device that does not exist.
        DataError: fewer prompts than a batch takes.
    """
    from rnow.models.loading import choose_device
    from rnow.plan.choices import DEFAULT_MAX_TOKENS, DEFAULT_MAX_TURNS, student_quantization
    from rnow.plan.prepare import count_steps

    data, trainer = config.data, config.trainer
    steps = count_steps(config, dataset)
    rollouts = steps * data.batch_size * data.group_size
    lengths = [len(ids) for ids in preflight.prompt_token_ids.values()]
    cap = config.rollout.max_tokens or DEFAULT_MAX_TOKENS
    room = preflight.window - min(lengths, default=0)
    completion = room if tools else min(cap, room)

    student_device = _device_name(config.model.device, None)
    quantization = student_quantization(config, choose_device(config.model.device))
    student_plan, student_memory = _model(student, config.model, student_device, quantization)
    teacher_plan, teacher_memory = None, None
    if teacher is not None and config.teacher is not None:
        teacher_plan, teacher_memory = _model(
            teacher,
            config.teacher,
            _device_name(config.teacher.device, config.teacher.device_map),
            config.teacher.quantization,
        )

    known = dict(devices or {})
    used = [plan.device for plan in (student_plan, teacher_plan) if plan is not None]
    infos = {name: known.get(name) or describe_device(name) for name in dict.fromkeys(used)}
    turns = may_take_turns(config)
    settings: dict[Residence, MemorySettings] = {
        kind: _settings(
            config,
            student_memory,
            teacher_memory,
            preflight,
            completion=completion,
            device=infos[student_device],
            time_shared=kind == "time_shared",
        )
        for kind in _KINDS
    }
    plans = _device_plans(config, settings, infos, student_plan, teacher_plan, turns)
    checkpoint = (
        student_memory.shape.lora_parameters(config.model.qlora_rank) * 4 * MOMENTS_AND_ADAPTER
    )
    return Plan(
        dataset_type=config.dataset_type,
        tools=tuple(tools),
        max_turns=(config.rollout.max_turns or DEFAULT_MAX_TURNS) if tools else 1,
        run_dir=str(run_dir),
        student=student_plan,
        teacher=teacher_plan,
        prompts=len(dataset.prompts),
        held_out=len(dataset.held_out),
        epochs=trainer.num_epochs,
        steps=steps,
        prompts_per_step=data.batch_size,
        rollouts_per_prompt=data.group_size,
        rollouts=rollouts,
        updates=steps * trainer.updates_per_batch,
        window=preflight.window,
        longest_prompt=preflight.longest_prompt,
        completion_tokens=completion,
        max_total_tokens=rollouts * completion,
        vocabulary=preflight.vocabulary,
        stop_ids=preflight.stop_ids,
        trainable_parameters=student_memory.shape.lora_parameters(config.model.qlora_rank),
        devices=plans,
        checkpoint_bytes=checkpoint,
        # One more than is kept: the next is complete before the oldest goes.
        checkpoints_bytes=checkpoint * (trainer.keep_checkpoints + 1),
        disk_free_bytes=_free_disk(run_dir),
        notices=tuple(notices),
        warnings=(*dataset.warnings, *preflight.warnings, *_host_warnings(plans, turns)),
    )


def may_take_turns(config: Config) -> frozenset[Part]:
    """The parts that could take turns on the student's card; none where there is nothing to share.

    Raises:
        ConfigError: turns are asked for on a CPU.
    """
    from rnow.models.loading import choose_device
    from rnow.plan.choices import sharers

    if choose_device(config.model.device).type != "cuda":
        if config.residency == "time_shared":
            raise ConfigError(
                "sampler, teacher and trainer can take turns on a CUDA card only",
                where="residency",
                why="on a CPU the sleeping ones would wait in the very memory they leave, and vLLM has no sleep mode",
                fix="set residency: auto",
            )
        return frozenset()
    parts = sharers(config)
    return parts if len(parts) > 1 and config.residency != "resident" else frozenset()


def taking_turns(prepared: Prepared, run_dir: Path) -> frozenset[Part]:
    """The parts that take turns in this run, by its config and, with ``residency: auto``, by what fits the card now.

    Raises:
        ConfigError: as ``may_take_turns``.
    """
    turns = may_take_turns(prepared.config)
    if not turns or prepared.config.residency == "time_shared":
        return turns
    plan = build_plan(
        prepared.config,
        prepared.project.dataset,
        prepared.student,
        prepared.teacher,
        prepared.preflight,
        run_dir=run_dir,
        tools=tuple(prepared.tools),
    )
    return turns if plan.devices[0].residency == "time_shared" else frozenset()


def describe_device(name: str) -> DeviceInfo:
    """Name and memory of a torch device; any other name stands for all GPUs together."""
    import torch

    if name == "cpu" or not torch.cuda.is_available():
        total, free = _cpu_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return DeviceInfo(
            device=name, name=f"CPU, {cores} cores", total_bytes=total, free_bytes=free
        )
    if name.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(name)
        title = torch.cuda.get_device_name(name)
        return DeviceInfo(device=name, name=title, total_bytes=total, free_bytes=free)
    cards = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    return DeviceInfo(
        device=name,
        name=f"{len(cards)} GPUs",
        total_bytes=sum(total for _, total in cards),
        free_bytes=sum(free for free, _ in cards),
    )


def _model(
    resolved: ResolvedModel, section: Any, device: str, quantization: Quantization
) -> tuple[ModelPlan, ModelMemory]:
    """``section`` is the config's ``model`` or ``teacher``."""
    import torch

    from rnow.models.loading import choose_dtype

    kind = "cpu" if device.startswith("cpu") or not torch.cuda.is_available() else "cuda"
    dtype = choose_dtype(section.dtype, torch.device(kind))
    shape = measure(resolved, trust_remote_code=section.trust_remote_code)
    memory = ModelMemory(shape=shape, width=dtype.itemsize, quantization=quantization)
    plan = ModelPlan(
        path=resolved.path,
        revision=resolved.revision,
        architecture=shape.architecture,
        parameters=shape.parameters,
        weights_bytes=resolved.weights_bytes,
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        device=device,
    )
    return plan, memory


def _device_name(device: str, device_map: str | None) -> str:
    """One name per device, so that two models on one card are added up: ``cuda`` is ``cuda:0``, and so is every device
    map on a machine with a single GPU."""
    import torch

    from rnow.models.loading import choose_device

    if device_map is not None:
        several = torch.cuda.is_available() and torch.cuda.device_count() > 1
        return f"device_map {device_map}" if several else _device_name("auto", None)
    name = str(choose_device(device))
    return "cuda:0" if name == "cuda" else name


def _settings(
    config: Config,
    student: ModelMemory,
    teacher: ModelMemory | None,
    preflight: Preflight,
    *,
    completion: int,
    device: DeviceInfo,
    time_shared: bool,
) -> MemorySettings:
    """The same defaults as the parts themselves take."""
    from rnow.algorithm.head import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES
    from rnow.models.scoring import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS
    from rnow.plan.choices import sampler_backend, student_share, teacher_backend, teacher_share
    from rnow.sampling.transformers import CPU_BATCH_BYTES, GPU_BATCH_FRACTION

    served = None
    if teacher is not None and config.teacher is not None:
        by_vllm = teacher_backend(config.teacher) == "vllm"
        share = teacher_share(config, time_shared=time_shared)
        served = _engine_bytes(by_vllm, share, teacher, device)
        if config.teacher.url is not None:
            teacher = None  # on somebody else's machine
    on_gpu = device.device.startswith("cuda")
    cache = CPU_BATCH_BYTES if not on_gpu else int(device.total_bytes * GPU_BATCH_FRACTION)
    if config.sampler.batch_memory_gb is not None:
        cache = int(config.sampler.batch_memory_gb * 1e9)
    tokens = config.trainer.micro_batch_tokens
    checkpointing = config.trainer.gradient_checkpointing
    return MemorySettings(
        student=student,
        teacher=teacher,
        rank=config.model.qlora_rank,
        rollouts=config.data.batch_size * config.data.group_size,
        prompt_tokens=preflight.longest_prompt,
        completion_tokens=completion,
        window=preflight.window,
        micro_batch_tokens=tokens or (GPU_MICRO_BATCH_TOKENS if on_gpu else CPU_MICRO_BATCH_TOKENS),
        gradient_checkpointing=on_gpu if checkpointing == "auto" else checkpointing,
        cache_budget=cache,
        # A server given by url holds nothing here.
        engine=0
        if config.sampler.url is not None
        else _engine_bytes(
            sampler_backend(config) == "vllm",
            student_share(config, time_shared=time_shared),
            student,
            device,
        ),
        teacher_engine=served,
        head_buffer=GPU_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES,
    )


def _engine_bytes(
    by_vllm: bool, share: float, model: ModelMemory, device: DeviceInfo
) -> int | None:
    """What a vLLM process takes: its share of a card at once, on a CPU its weights and VLLM_CPU_KVCACHE_SPACE."""
    if not by_vllm:
        return None
    if device.device.startswith("cuda"):
        return round(share * device.total_bytes)
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")) * 2**30
    return round(model.weight_bytes) + cache + ENGINE_WORK


def _device_plans(
    config: Config,
    settings: Mapping[Residence, MemorySettings],
    infos: Mapping[str, DeviceInfo],
    student: ModelPlan,
    teacher: ModelPlan | None,
    turns: frozenset[Part],
) -> tuple[DevicePlan, ...]:
    """One plan per device, that of the student first."""
    owners: dict[str, list[Literal["student", "teacher"]]] = {student.device: ["student"]}
    if teacher is not None:
        owners.setdefault(teacher.device, []).append("teacher")
    plans = []
    for device, models in owners.items():
        here = turns if device == student.device else frozenset()
        kinds = _KINDS if here else _KINDS[:1]
        found = {
            kind: _device_plan(settings[kind], infos[device], models, kind, here) for kind in kinds
        }
        chosen = found["resident"]
        if here and (config.residency == "time_shared" or not chosen.fits):
            chosen = found["time_shared"]
        peaks = {kind: plan.peak_bytes for kind, plan in found.items()} if here else {}
        smaller = _with_nf4_teacher(settings["resident"], models) if here else None
        plans.append(replace(chosen, peaks=peaks, with_nf4_teacher=smaller))
    return tuple(plans)


def _with_nf4_teacher(
    settings: MemorySettings, models: Collection[Literal["student", "teacher"]]
) -> int | None:
    teacher = settings.teacher
    if teacher is None or "teacher" not in models or teacher.quantization == "nf4":
        return None
    if settings.teacher_engine is not None:
        return None  # it takes its share of the card, however it stores its weights
    changed = replace(settings, teacher=replace(teacher, quantization="nf4"))
    return peak([part for part in memory_parts(changed) if part.model in models])[0]


def _device_plan(
    settings: MemorySettings,
    info: DeviceInfo,
    models: list[Literal["student", "teacher"]],
    kind: Residence,
    sharers: frozenset[Part],
) -> DevicePlan:
    turns = sharers if kind == "time_shared" else frozenset()
    parts = tuple(part for part in memory_parts(settings) if part.model in models)
    most, stage = peak_in_turns(parts, turns)
    advice: tuple[str, ...] = ()
    if most > info.free_bytes:
        advice = tuple(
            f"{setting}  (peak {format_bytes(after)})"
            for setting, after in savings(settings, models, turns)[:MAX_ADVICE]
        )
    return DevicePlan(
        info=info,
        parts=parts,
        peak_bytes=most,
        peak_stage=stage,
        advice=advice,
        residency=kind,
        least_bytes=least(parts, turns),
        lacking=_lacking(settings, models) if info.device.startswith("cuda") else (),
    )


def _lacking(
    settings: MemorySettings, models: list[Literal["student", "teacher"]]
) -> tuple[str, ...]:
    """One line for each vLLM that would not start, for want of memory of its own."""
    engines = {
        "student": ("sampler", settings.student, settings.engine),
        "teacher": ("teacher", settings.teacher, settings.teacher_engine),
    }
    lines = []
    for model in models:
        section, memory, total = engines[model]
        if memory is not None and total and total < (needed := engine_least(memory, settings)):
            lines.append(
                f"{section}.gpu_memory_utilization gives vLLM {format_bytes(total)}; its weights and one sequence of "
                f"{settings.window:,} tokens need {format_bytes(needed)}"
            )
    return tuple(lines)


def _host_warnings(plans: tuple[DevicePlan, ...], turns: frozenset[Part]) -> tuple[str, ...]:
    """What sleeps must find room in main memory."""
    warnings = []
    for plan in plans:
        if plan.residency == "time_shared":
            kept = [part for part in plan.parts if part.owner in turns and part.stage == "always"]
            needed = sum(part.bytes for part in kept if part.name not in _NOT_KEPT)
            free = _cpu_memory()[1]
            if needed > free:
                warnings.append(
                    f"the parts that sleep need up to {format_bytes(needed)} of main memory, and {format_bytes(free)} "
                    "are free"
                )
    return tuple(warnings)


def format_bytes(amount: float) -> str:
    """``1.2 GB``, ``34 MB``: powers of ten, as disks and cards are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            value = amount / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:,.0f} {unit}"
    return f"{amount:.0f} B"


def _cpu_memory() -> tuple[int, int]:
    """(total, available) bytes for this process: the machine's, or its container's if that is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo_available() or page * os.sysconf("SC_AVPHYS_PAGES")
    limit = _cgroup_number("memory.max")
    if limit is not None and limit < total:
        used = _cgroup_number("memory.current") or 0
        return limit, min(free, max(0, limit - used))
    return total, free


def _meminfo_available() -> int | None:
    """The kernel's own figure, which counts caches it would give up."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_number(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _free_disk(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
