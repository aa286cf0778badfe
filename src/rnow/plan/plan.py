"""The plan of a run: what it will do, how large it is and whether it fits, before a weight is loaded."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rnow.algorithm.head import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES, cpu_tile_bytes
from rnow.config import Config
from rnow.config.teachers import TEACHER
from rnow.display.terminal import format_bytes
from rnow.errors import ConfigError
from rnow.models.activations import update_tokens
from rnow.models.adapter import describe
from rnow.models.downloads import cache_folder, hub_address
from rnow.models.loading import choose_device
from rnow.models.scoring import scoring_tokens
from rnow.models.shape import ModelShape, build_empty, shape_of
from rnow.models.sharing import INT8_APART
from rnow.plan.choices import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_MAX_TURNS,
    LAYER_SECONDS,
    control_warning,
    describe_signal,
    missing_trackers,
    reads_hidden_states,
    slow_paths,
    teacher_answers,
)
from rnow.plan.devices import DeviceInfo, cpu_memory, describe_device, free_disk, same_disk
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
    Role,
    RunModel,
    dtype_name,
    engine_share,
    sharers,
    teachers_of,
    to_fetch,
)
from rnow.plan.sources import rows_of
from rnow.plan.streamed import Streaming, asked_to_stream, could_stream, describe_streaming
from rnow.plan.unread import unread_settings
from rnow.policy.lora import check_fit, count_adapter
from rnow.sampling.transformers import CPU_BATCH_BYTES, GPU_BATCH_FRACTION
from rnow.training.residency import Part

MOMENTS_AND_ADAPTER = 3
TRANSCRIPT_TOKEN, JOURNAL_TOKEN = 25, 24
"""Bytes for one token: compressed, its id, text and six numbers; its id, one number and its part of the messages."""
MAX_ADVICE = 4
HOST_FIX = "set teacher.quantization: nf4, give a teacher a device or a server of its own, or free main memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model of the run. ``weights_bytes`` is the size of its files, ``dtype`` that of unquantised numbers; ``own_base``: it
    is the student's base, of which there is one copy; ``streaming``: its layers are read while it works. ``separate``: why each of
    its samples is computed in a row of its own, empty where what several begin with is computed once, None where a server does
    as it likes."""

    path: str
    revision: str | None
    architecture: str
    parameters: int
    weights_bytes: int
    dtype: str
    quantization: str
    device: str
    own_base: bool = False
    streaming: Streaming | None = None
    separate: str | None = None


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
        host_bytes, host_free_bytes: of main memory, what the parts that sleep need and what there is.
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
    host_bytes: int = 0
    host_free_bytes: int = 0

    @property
    def host_suffices(self) -> bool:
        """Whether what sleeps has room in main memory."""
        return self.host_bytes <= self.host_free_bytes

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the memory that may be filled."""
        return self.peak_bytes <= self.info.usable_bytes and not self.lacking and self.host_suffices

    @property
    def hopeless(self) -> bool:
        """Whether even the least is too much; otherwise shorter answers than the longest may fit."""
        too_much = self.least_bytes > self.info.usable_bytes
        return too_much or bool(self.lacking) or not self.host_suffices


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPlan:
    """What ``rnow run`` has to fetch first: bytes by role, from where, into which folder, and what its disk has free.
    ``beside_run``: the run folder is on the same disk."""

    models: Mapping[str, int]
    source: str
    folder: str
    free_bytes: int
    beside_run: bool

    @property
    def bytes(self) -> int:
        """Of all models."""
        return sum(self.models.values())

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return self.bytes <= self.free_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsPlan:
    """What is trained on where nothing is sampled: ``sequences`` of one epoch, rows of sft or windows of documents, and the
    ``tokens`` and ``loss_tokens`` in them; the tokens of the ``longest``, held out ones too; what ends a document, where the rows
    are documents."""

    sequences: int
    tokens: int
    loss_tokens: int
    longest: int
    end: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Counts are totals of the run unless named per step; sizes are bytes.

    ``models`` is by role, the student first; ``judged`` how many of the prompts each teacher judges; ``longest_told`` the
    longest prompt that a teacher reads in other words than the student, 0 without any. ``recomputed_layers`` of the student's
    ``layers`` keep no activations for the backward pass; ``starts_from`` is the adapter that training goes on from.
    ``completion_tokens`` is the longest answer, ``max_total_tokens`` what all answers together cannot exceed. With ``rows`` there are
    no answers.
    """

    dataset_type: str
    rows: RowsPlan | None
    signal: str
    tools: tuple[str, ...]
    max_turns: int
    run_dir: str
    models: Mapping[str, ModelPlan]
    longest_told: int
    prompts: int
    judged: Mapping[str, int]
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
    recomputed_layers: int
    layers: int
    starts_from: str | None
    devices: tuple[DevicePlan, ...]
    download: DownloadPlan | None
    checkpoint_bytes: int
    checkpoints_bytes: int
    journal_bytes: int
    transcripts_bytes: int
    disk_free_bytes: int
    notices: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice by the estimate."""
        fetched = self.download is None or self.download.fits
        return fetched and self.disk_suffices and all(device.fits for device in self.devices)

    @property
    def disk_suffices(self) -> bool:
        """Whether the longest answers of the whole run fit the disk too, beside models that are yet to come there."""
        coming = self.download.bytes if self.download and self.download.beside_run else 0
        return self.disk_bytes + coming <= self.disk_free_bytes

    @property
    def disk_bytes(self) -> int:
        """What the run writes at most: the checkpoints kept at once, the rollouts of a step and all transcripts."""
        return self.checkpoints_bytes + self.journal_bytes + self.transcripts_bytes

    def to_dict(self) -> dict[str, object]:
        """Plain values for ``--json``, verdicts included; each model under the name of its role."""
        values = asdict(self)
        for device, plain in zip(self.devices, values["devices"], strict=True):
            plain["fits"] = device.fits
            for part in plain["parts"]:
                del part["kind"], part["host"], part["device"], part["stays"]
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
        ConfigError: as ``may_take_turns``; or activations are to be recomputed by a model that cannot.
    """
    config, dataset, rendered = prepared.config, prepared.project.dataset, prepared.rendered
    data, trainer = config.data, config.trainer
    per_step = data.batch_size * data.group_size if config.on_policy else 0
    rollouts, turns = prepared.num_steps * per_step, may_take_turns(prepared)
    layout, planned = _where_it_fits(_layout(prepared, known=devices or {}), turns)
    layout, planned = _fewest_recomputed(layout, turns, planned)
    completion, checkpoint = layout.completion, layout.adapter * 4 * MOMENTS_AND_ADAPTER
    return Plan(
        dataset_type=config.dataset_type,
        rows=None if config.on_policy else _rows_plan(prepared),
        signal=describe_signal(config),
        tools=tuple(prepared.tools),
        max_turns=(config.rollout.max_turns or DEFAULT_MAX_TURNS) if prepared.tools else 1,
        run_dir=str(run_dir),
        models=_model_plans(layout),
        longest_told=rendered.longest_told,
        prompts=len(dataset.prompts),
        judged=prepared.judged,
        held_out=len(dataset.held_out),
        epochs=trainer.num_epochs,
        steps=prepared.num_steps,
        prompts_per_step=data.batch_size,
        rollouts_per_prompt=data.group_size if config.on_policy else 0,
        rollouts=rollouts,
        updates=prepared.num_steps * trainer.updates_per_batch,
        window=rendered.window,
        longest_prompt=rendered.longest_prompt,
        completion_tokens=completion,
        max_total_tokens=rollouts * completion,
        vocabulary=rendered.vocabulary,
        stop_ids=rendered.stop_ids,
        stop_texts=tuple(rendered.tokenizer.decode([token]) for token in rendered.stop_ids),
        trainable_parameters=layout.adapter,
        recomputed_layers=layout.recomputed,
        layers=layout.shapes[STUDENT].layers,
        starts_from=None if prepared.start is None else describe(prepared.start),
        devices=planned,
        download=_download_plan(prepared, run_dir),
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=checkpoint * (trainer.keep_checkpoints + 1),  # and the next
        # Of the step after the last checkpoint and of the one in progress.
        journal_bytes=2 * per_step * (completion * JOURNAL_TOKEN + rendered.longest_prompt),
        transcripts_bytes=rollouts * (completion * TRANSCRIPT_TOKEN + rendered.longest_prompt),
        disk_free_bytes=free_disk(run_dir),
        notices=(*prepared.notices, *_teacher_notice(layout)),
        warnings=_warnings(prepared),
    )


def _download_plan(prepared: Prepared, run_dir: Path) -> DownloadPlan | None:
    coming = to_fetch(prepared.models.values())
    if not coming:
        return None
    cache = cache_folder()
    return DownloadPlan(
        models={model.role.name: size for model, size in coming},
        source=hub_address(),
        folder=str(cache),
        free_bytes=free_disk(cache),
        beside_run=same_disk(cache, run_dir),
    )


def _rows_plan(prepared: Prepared) -> RowsPlan:
    rendered = prepared.rendered
    own = rows_of(prepared.project.dataset.prompts, rendered.rows)
    end = rendered.tokenizer.eos_token_id
    documents = prepared.config.dataset_type == "midtrain" and end is not None
    return RowsPlan(
        sequences=len(own),
        tokens=sum(len(row.token_ids) for row in own),
        loss_tokens=sum(row.loss_tokens for row in own),
        longest=_longest_row(prepared),
        end=rendered.tokenizer.decode([end]) if documents and end is not None else None,
    )


def _longest_row(prepared: Prepared) -> int:
    rows = chain.from_iterable(prepared.rendered.rows.values())
    return max((len(row.token_ids) for row in rows), default=0)


def _warnings(prepared: Prepared) -> tuple[str, ...]:
    config, project = prepared.config, prepared.project
    return (
        *control_warning(config),
        *prepared.warnings,
        *project.dataset.warnings,
        *prepared.rendered.warnings,
        *unread_settings(config, agentic=project.agentic),
        *slow_paths(config),
        *missing_trackers(config),
    )


def measure(prepared: Prepared) -> tuple[dict[str, ModelShape], int]:
    """The sizes of every model, and the parameters of the student's adapter.

    Raises:
        ModelError: a model of a family that cannot be used, layers to adapt that are not there, or an adapter to go on from that
            is none of this student.
    """
    adapter = 0
    shapes = {}
    for name, model in prepared.models.items():
        role = model.role
        answers = (
            prepared.config.on_policy
            if role.trained
            else prepared.config.evaluation.teacher is True
        )
        empty = build_empty(
            model.resolved,
            key=f"{role.key}.path",
            sampled=answers and role.backend == "transformers",
            trust_remote_code=role.section.trust_remote_code,
            # Of a teacher that vLLM serves, no kernel of transformers is used.
            attention=role.section.attn_implementation
            if role.trained or role.backend == "transformers"
            else None,
        )
        shapes[name] = shape_of(empty)
        if role.trained:
            adapter = _count_adapter(prepared, empty)
    return shapes, adapter


def _count_adapter(prepared: Prepared, student: Any) -> int:
    section, start = prepared.config.model, prepared.start
    if start is not None:
        return check_fit(student, start, asked=section.lora_targets)
    return count_adapter(student, rank=section.qlora_rank, targets=section.lora_targets)


def _teacher_notice(layout: _Layout) -> tuple[str, ...]:
    """What the teachers' own answers to the held-out prompts cost, or that there are none."""
    prepared, section = layout.prepared, layout.prepared.config.evaluation
    judged = Counter(prompt.teacher for prompt in prepared.evaluated)
    teachers = [model.role for model in teachers_of(prepared.models) if judged[model.role.name]]
    if not teachers or any(
        role.crosses or role.name in layout.streamed or prepared.models[role.name].own_base
        for role in teachers
    ):
        return ()
    answers = {role.name: judged[role.name] * section.num_samples for role in teachers}
    what = f"{sum(answers.values()):,} answers to the held-out prompts, of at most {layout.completion:,} tokens"
    slow = [role for role in teachers if role.backend == "transformers" and role.on_gpu]
    if slow:
        seconds = sum(_decode_seconds(layout, role, answers[role.name]) for role in slow)
        what += f", about {seconds / 3600:.1f} h with transformers at that length"
    who = "the teacher itself is" if len(teachers) == 1 else "the teachers themselves are"
    if answering_teachers(prepared, layout.shapes, layout.streamed):
        return (f"{who} evaluated, once: {what}",)
    return (f"{who} not evaluated; evaluation.teacher: true would: {what}",)


def answering_teachers(
    prepared: Prepared, shapes: Mapping[str, ModelShape], streamed: Collection[str]
) -> frozenset[str]:
    """The roles that answer held-out prompts, each those that it judges: all of them, or none where one is too slow for
    that, since half of the answers are nobody's. One of the ``streamed`` would read all its layers for every token."""
    judging = {prompt.teacher for prompt in prepared.evaluated}
    models = [model for model in teachers_of(prepared.models) if model.role.name in judging]
    if any(model.own_base for model in models):
        # Its answers are those of the student before training, or of no model that is trained.
        return frozenset()
    # A teacher of another tokenizer cannot answer in the student's tokens.
    asked = all(
        not role.crosses
        and role.name not in streamed
        and teacher_answers(prepared.config, shapes[role.name], served=role.backend == "vllm")
        for role in (model.role for model in models)
    )
    return frozenset(model.role.name for model in models) if asked else frozenset()


def _decode_seconds(layout: _Layout, role: Role, answers: int) -> float:
    """A batch of as many rows as its cache holds takes a step per token, whatever the rows."""
    shape = layout.shapes[role.name]
    tokens = min(
        layout.prepared.rendered.window, layout.prepared.rendered.longest_prompt + layout.completion
    )
    row = tokens * 2 * shape.layers * shape.kv_width * role.dtype.itemsize
    budget = layout.info(layout.placed[role.name]).total_bytes * GPU_BATCH_FRACTION
    batches = math.ceil(answers / max(1, budget // row))
    return batches * layout.completion * shape.layers * LAYER_SECONDS


def may_take_turns(prepared: Prepared) -> frozenset[Part]:
    """The parts that could take turns on the student's card; none where there is nothing to share.

    Raises:
        ConfigError: turns are asked for on a CPU.
    """
    config = prepared.config
    if choose_device(config.model.device, key="model.device").type != "cuda":
        if config.residency == "time_shared":
            raise ConfigError(
                "sampler, teacher and trainer can take turns on a CUDA card only",
                where="residency",
                why="on a CPU the sleeping ones would wait in the very memory they leave, and vLLM has no sleep mode",
                fix="set residency: auto",
            )
        return frozenset()
    roles = {name: model.role for name, model in prepared.models.items() if not model.own_base}
    parts = sharers(roles)
    return parts if len(parts) > 1 and config.residency != "resident" else frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Residencies:
    """What of a run is not in its place all the time: the parts that take turns on a card, the teachers, by role, whose
    layers are streamed, and how many of the student's layers compute their activations again in the backward pass; and
    the plan that says so."""

    plan: Plan
    turns: frozenset[Part] = frozenset()
    streamed: frozenset[str] = frozenset()
    recomputed: int = 0


def choose_residencies(prepared: Prepared, run_dir: Path) -> Residencies:
    """By the config and, where it leaves that open, by what fits now.

    Raises:
        ConfigError: as ``may_take_turns``; or what would sleep has no room in main memory.
        ModelError: a teacher cannot be streamed.
    """
    turns = may_take_turns(prepared)
    plan = build_plan(prepared, run_dir=run_dir)
    streamed = frozenset(name for name, model in plan.models.items() if model.streaming)
    shared = plan.devices[0]
    if not turns or shared.residency == "resident":
        return Residencies(plan=plan, streamed=streamed, recomputed=plan.recomputed_layers)
    if not shared.host_suffices:
        raise ConfigError(
            "what sleeps while the parts of the run take turns does not fit main memory",
            where="residency",
            why=f"it needs {format_bytes(shared.host_bytes)}, and {format_bytes(shared.host_free_bytes)} are free",
            fix=HOST_FIX,
        )
    return Residencies(plan=plan, turns=turns, streamed=streamed, recomputed=plan.recomputed_layers)


def _completion_tokens(prepared: Prepared) -> int:
    """The longest answer, or row where nothing is sampled. A conversation with tools may fill the window."""
    if not prepared.config.on_policy:
        return _longest_row(prepared)
    lengths = map(len, prepared.rendered.prompt_token_ids.values())
    room = prepared.rendered.window - min(lengths, default=0)
    cap = prepared.config.rollout.max_tokens or DEFAULT_MAX_TOKENS
    return room if prepared.tools else min(cap, room)


def _placement(role: Role, cards: Mapping[str, tuple[int, ...]]) -> str:
    """One name per device, so that two models on one card are added up."""
    if role.trained or role.name not in cards or (role.device_map is None and role.spread == 1):
        return role.card
    own = cards[role.name]
    if role.spread > 1 or len(own) == 1:
        return f"cuda:{own[0]}"
    return f"device_map {role.device_map}"


def _model_plans(layout: _Layout) -> dict[str, ModelPlan]:
    found = {}
    for name, model in layout.prepared.models.items():
        role, resolved, shape = model.role, model.resolved, layout.shapes[name]
        found[name] = ModelPlan(
            path=resolved.path,
            revision=resolved.revision,
            architecture=shape.architecture,
            parameters=shape.parameters,
            weights_bytes=resolved.weights_bytes,
            dtype=dtype_name(role.dtype),
            quantization=model.quantization,
            device=layout.placed[name],
            own_base=model.own_base,
            streaming=describe_streaming(model, shape, host_free=cpu_memory()[1])
            if name in layout.streamed
            else None,
            separate=_why_separate(model, shape),
        )
    return found


def _why_separate(model: RunModel, shape: ModelShape) -> str | None:
    if not model.role.trained and model.role.backend != "transformers":
        return None
    return INT8_APART if model.quantization == "int8" else shape.separate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What the plans of all devices are made from. ``adapter`` is what the student trains, ``placed`` the device of each
    role's model, ``known`` the memory of some devices, ``streamed`` the roles whose layers are read while they score,
    ``recomputed`` how many layers of the student compute their activations again."""

    prepared: Prepared
    shapes: Mapping[str, ModelShape]
    adapter: int
    placed: Mapping[str, str]
    known: Mapping[str, DeviceInfo]
    streamed: frozenset[str]
    recomputed: int

    @property
    def completion(self) -> int:
        """Tokens that a rollout may have at most."""
        return _completion_tokens(self.prepared)

    def info(self, device: str) -> DeviceInfo:
        """A device's memory: as known, or as it is now."""
        spread = [
            cards for name, cards in self.prepared.cards.items() if self.placed[name] == device
        ]
        return self.known.get(device) or describe_device(device, *spread[:1])

    def engine_device(self, role: Role) -> str:
        """Where a vLLM for this role runs."""
        if role.spread > 1 and role.on_gpu:
            return f"cuda:{self.prepared.cards[role.name][0]}"
        return self.placed[role.name]


def _layout(prepared: Prepared, *, known: Mapping[str, DeviceInfo]) -> _Layout:
    """As the config says it, with what it leaves open in memory."""
    shapes, adapter = measure(prepared)
    return _Layout(
        prepared=prepared,
        shapes=shapes,
        adapter=adapter,
        placed={n: _placement(m.role, prepared.cards) for n, m in prepared.models.items()},
        known=known,
        streamed=asked_to_stream(prepared.models, shapes),
        recomputed=_most_recomputed(prepared.config, shapes[STUDENT]),
    )


def _most_recomputed(config: Config, shape: ModelShape) -> int:
    wanted = config.trainer.gradient_checkpointing
    if wanted is True and shape.recomputes == "none":
        raise ConfigError(
            f"{shape.architecture} cannot compute its activations again in the backward pass",
            where="trainer.gradient_checkpointing",
            why="transformers has no checkpointing for this architecture",
            fix="set trainer.gradient_checkpointing: auto; a smaller trainer.micro_batch_tokens saves memory too",
        )
    if wanted is False or shape.recomputes == "none":
        return 0
    return shape.layers


def _fewest_recomputed(
    layout: _Layout, turns: frozenset[Part], devices: tuple[DevicePlan, ...]
) -> tuple[_Layout, tuple[DevicePlan, ...]]:
    """With as few layers recomputed as fit where the config leaves it open: each costs a forward pass of its own. What is where
    does not change for it."""
    student, most = devices[0], layout.recomputed
    if layout.prepared.config.trainer.gradient_checkpointing != "auto" or not student.fits:
        return layout, devices
    by_layer = layout.shapes[STUDENT].recomputes == "any number"

    def planned(number: int) -> tuple[_Layout, tuple[DevicePlan, ...]]:
        changed = replace(layout, recomputed=number)
        return changed, _device_plans(changed, turns)

    def fits(number: int) -> bool:
        first = planned(number)[1][0]
        return first.fits and first.residency == student.residency

    found = bisect_left(range(most) if by_layer else range(min(1, most)), True, key=fits)
    if not by_layer and found:
        return layout, devices
    if found == most:
        return layout, devices
    layout, (first, *others) = planned(found)
    if (first.with_nf4_teacher or 0) > first.info.usable_bytes:
        # The layers that are recomputed were chosen for other teachers.
        first = replace(first, with_nf4_teacher=student.with_nf4_teacher)
    return layout, (first, *others)


def _where_it_fits(
    layout: _Layout, turns: frozenset[Part]
) -> tuple[_Layout, tuple[DevicePlan, ...]]:
    """The layout as it is, or with those teachers streamed that may be and are where it does not fit, if that helps."""

    def faults(devices: tuple[DevicePlan, ...]) -> tuple[int, int]:
        return sum(d.hopeless for d in devices), sum(not d.fits for d in devices)

    devices = _device_plans(layout, turns)
    crowded = {device.info.device for device in devices if not device.fits}
    models = layout.prepared.models
    more = {
        name
        for name in could_stream(layout.prepared.config, models, layout.shapes) - layout.streamed
        if models[name].role.residency == "auto" and layout.placed[name] in crowded
    }
    if not more:
        return layout, devices
    streamed = replace(layout, streamed=layout.streamed | more)
    instead = _device_plans(streamed, turns)
    return (streamed, instead) if faults(instead) < faults(devices) else (layout, devices)


def _device_plans(layout: _Layout, turns: frozenset[Part]) -> tuple[DevicePlan, ...]:
    """One plan per device, that of the student first: only there is a choice between all at once and taking turns."""
    roles = [model.role for model in layout.prepared.models.values()]
    names = [layout.placed[role.name] for role in roles]
    names += [layout.engine_device(role) for role in roles if role.starts_vllm]
    infos = {device: layout.info(device) for device in dict.fromkeys(names)}
    shared = layout.placed[STUDENT]
    settings = _settings(layout, infos, time_shared=False)
    first, *others = (_device_plan(settings, info) for info in infos.values())
    if turns:
        in_turns = _settings(layout, infos, time_shared=True)
        alternative = _device_plan(in_turns, infos[shared], turns)
        preferred = layout.prepared.config.residency == "time_shared" or not first.fits
        first = replace(
            alternative if preferred else first,
            peaks={"resident": first.peak_bytes, "time_shared": alternative.peak_bytes},
            with_nf4_teacher=_with_nf4_teachers(settings, shared),
        )
    return (first, *others)


def _settings(
    layout: _Layout, infos: Mapping[str, DeviceInfo], *, time_shared: bool
) -> MemorySettings:
    """The same defaults as the parts themselves take."""
    prepared = layout.prepared
    config, rendered = prepared.config, prepared.rendered
    device = infos[layout.placed[STUDENT]]
    on_gpu = device.on_gpu
    cache = CPU_BATCH_BYTES if not on_gpu else int(device.total_bytes * GPU_BATCH_FRACTION)
    if config.sampler.batch_memory_gb is not None:
        cache = int(config.sampler.batch_memory_gb * 1e9)
    tokens = config.trainer.micro_batch_tokens
    return MemorySettings(
        models={
            name: _model_memory(layout, model, infos, time_shared=time_shared)
            for name, model in prepared.models.items()
        },
        rank=config.model.qlora_rank,
        adapter_parameters=layout.adapter,
        rollouts=config.data.batch_size * (config.data.group_size if config.on_policy else 1),
        prompts=config.data.batch_size,
        sampled=config.on_policy,
        prompt_tokens=rendered.longest_prompt,
        teacher_extra=rendered.teacher_extra,
        completion_tokens=layout.completion,
        window=rendered.window,
        micro_batch_tokens=tokens
        or update_tokens(
            layout.shapes[STUDENT],
            width=prepared.student.role.dtype.itemsize,
            rank=config.model.qlora_rank,
            on_gpu=on_gpu,
        ),
        scoring_tokens=tokens or scoring_tokens(on_gpu=on_gpu),
        recomputed_layers=layout.recomputed,
        cache_budget=cache,
        head_tile=GPU_BUFFER_BYTES if on_gpu else cpu_tile_bytes(),
        head_kept=GPU_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES,
        hidden_states=reads_hidden_states(config),
    )


def _model_memory(
    layout: _Layout, model: RunModel, infos: Mapping[str, DeviceInfo], *, time_shared: bool
) -> ModelMemory:
    role = model.role
    memory = ModelMemory(
        role=role,
        shape=layout.shapes[role.name],
        width=role.dtype.itemsize,
        quantization=model.quantization,
        device=layout.placed[role.name],
        own_base=model.own_base,
        streamed=role.name in layout.streamed,
        streamable=role.name
        in could_stream(layout.prepared.config, layout.prepared.models, layout.shapes),
    )
    if role.serving.url is not None:
        return replace(memory, engine=0)
    if role.backend != "vllm":
        return memory
    there = layout.engine_device(role)
    memory = replace(memory, engine_device=there, cards=role.spread)
    if infos[there].on_gpu:
        student = layout.prepared.student.role
        share = engine_share(role, student, time_shared=time_shared)
        return replace(memory, engine=round(share * infos[there].total_bytes))
    cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")) * 2**30
    return replace(memory, engine=round(memory.weight_bytes / memory.cards) + cache + ENGINE_WORK)


def _with_nf4_teachers(settings: MemorySettings, device: str) -> int | None:
    """The peak with every teacher on the device in 4 bits; None where there is none to change."""
    changed = settings
    for role, model in settings.models.items():
        # A vLLM takes its share of the card, however it stores its weights.
        loaded = model.device == device and model.engine is None and not model.own_base
        if role != STUDENT and loaded and model.quantization != "nf4":
            changed = with_nf4(changed, role)
    if changed is settings:
        return None
    return peak([part for part in memory_parts(changed) if part.device == device])[0]


def _device_plan(
    settings: MemorySettings, info: DeviceInfo, turns: frozenset[Part] = frozenset()
) -> DevicePlan:
    parts = tuple(part for part in memory_parts(settings) if part.device == info.device)
    most, stage = peak_in_turns(parts, turns)
    advice: tuple[str, ...] = ()
    if most > info.usable_bytes:
        advice = tuple(
            f"{setting}  (peak {format_bytes(after)})"
            for setting, after in savings(settings, info.device, turns)[:MAX_ADVICE]
        )
    return DevicePlan(
        info=info,
        parts=parts,
        peak_bytes=most,
        peak_stage=stage,
        advice=advice,
        residency="time_shared" if turns else "resident",
        least_bytes=least(parts, turns),
        lacking=_lacking(settings, info.device) if info.on_gpu else (),
        host_bytes=sum(part.host for part in parts if part.owner in turns or not part.owner),
        host_free_bytes=cpu_memory()[1],
    )


def _lacking(settings: MemorySettings, device: str) -> tuple[str, ...]:
    """One line for each vLLM that would not start, for want of memory of its own."""
    lines = []
    for model in settings.models.values():
        total = model.engine if model.engine_device == device else None
        if total and total < (needed := engine_least(model, settings)):
            lines.append(
                f"{model.role.serving_key}.gpu_memory_utilization gives vLLM {format_bytes(total)}; its weights and one sequence of "
                f"{settings.window:,} tokens need {format_bytes(needed)}"
            )
    return tuple(lines)
