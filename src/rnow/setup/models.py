"""The models that this process holds: loaded as the config says, the student as a policy with its embedded sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rnow.algorithm.head import Head
from rnow.models.adapter import TrainedAdapter
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.offload import tensors_of
from rnow.plan.choices import reads_hidden_states
from rnow.plan.prepare import Prepared
from rnow.plan.rendered import Rendered
from rnow.plan.roles import STUDENT, RunModel, dtype_name
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.protocols import Teacher
from rnow.sampling.transformers import TransformersSampler
from rnow.setup.objective import build_objective
from rnow.teacher.base import ReferenceTeacher
from rnow.teacher.cross import CrossTeacher
from rnow.teacher.transformers import TransformersTeacher

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    """What is said of the student that is trained, wherever its weights are.

    Attributes:
        dtype: of its unquantised numbers, ``bfloat16``.
        quantization: how its linear layers are stored.
        device: the device's own name, as ``device_name`` gives it.
        vocabulary: ids that it can draw.
    """

    dtype: str
    quantization: str
    device: str
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStudent:
    """The student in this process.

    Attributes:
        sampler: draws with the trainer's weights; None where something else draws.
        as_teacher: scores with the student as it is now.
        own_base: scores with the student's base, adapter off: the teacher of itself.
    """

    facts: StudentFacts
    policy: LoraPolicy
    sampler: TransformersSampler | None
    as_teacher: TransformersTeacher
    own_base: ReferenceTeacher


def load_model(
    model: RunModel, rendered: Rendered, *, cards: Sequence[int] = (), streamed: bool = False
) -> CausalLM:
    """A model of the run, frozen, with its head cut to the ids that count and made for the run's window.

    Args:
        cards: over which its device map may spread it.
        streamed: its layers stay in its files and are read while it works.
    """
    role, section = model.role, model.role.section
    quantization = model.quantization
    assert quantization != "fp8", "refused with the config: only vLLM has it"
    return load_causal_lm(
        model.resolved.local_dir,
        vocabulary=rendered.vocabulary_of(role.name),
        dtype=role.dtype,
        device=role.device,
        quantization=quantization,
        device_map=role.device_map,
        cards=cards if role.device_map is not None else (),
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        window=rendered.window_of(role.name),
        streamed=streamed,
    )


def build_student(
    prepared: Prepared,
    student: CausalLM,
    poll: Callable[[], None],
    heads: dict[str, Head],
    *,
    embedded: bool,
    recomputed: int = 0,
) -> LocalStudent:
    """The policy on a loaded base, and what else works with the same weights.

    Args:
        heads: see ``build_objective``; the student's own is added.
        embedded: draw with them, too.
        recomputed: how many of its layers keep no activations for the backward pass.
    """
    # Before the policy: in merged mode it copies the base as it is before PEFT wraps it.
    sampler = (
        TransformersSampler.for_student(student, batch_bytes=batch_bytes(prepared), poll=poll)
        if embedded
        else None
    )
    heads[STUDENT] = student.head
    policy = build_policy(prepared, student, poll, heads, recomputed)
    if sampler is not None:
        policy.take_along(lambda embedded=sampler: tensors_of(embedded.model))
        policy.before_updates(sampler.make_room)
    as_teacher = score_with(prepared, student, poll, role=STUDENT)
    return LocalStudent(
        facts=StudentFacts(
            dtype=dtype_name(student.head.weight.dtype),
            quantization=student.quantization,
            device=device_name(student.device),
            vocabulary=student.head.vocabulary,
        ),
        policy=policy,
        sampler=sampler,
        as_teacher=as_teacher,
        own_base=ReferenceTeacher(as_teacher, policy.model.disable_adapter),
    )


def as_begun(prepared: Prepared, student: LocalStudent) -> ReferenceTeacher:
    """Scores with the student as the run began, which a run without a teacher stays near: its base, or the base with the adapter to
    go on from."""
    if prepared.start is None:
        return student.own_base
    began = partial(student.policy.holding, prepared.start.tensors())
    return ReferenceTeacher(student.as_teacher, began)


def score_with(
    prepared: Prepared, lm: CausalLM, poll: Callable[[], None], *, role: str
) -> TransformersTeacher:
    """A model in this process behind the Teacher protocol."""
    config = prepared.config
    return TransformersTeacher(
        lm,
        role=role,
        head_stays=role != STUDENT and reads_hidden_states(config),
        # Of the answers; rows have none.
        temperature=config.rollout.temperature if config.on_policy else 1.0,
        micro_batch_tokens=prepared.config.trainer.micro_batch_tokens,
        poll=poll,
    )


def read_across(prepared: Prepared, model: RunModel, teacher: Teacher) -> Teacher:
    """A teacher as it is, or behind its own tokenizer where that is another than the student's."""
    crossed = prepared.rendered.crossed.get(model.role.name)
    if crossed is None:
        return teacher
    return CrossTeacher(
        teacher,
        crossing=crossed.crossing,
        prompts=crossed.prompt_token_ids,
        window=crossed.window,
        where=f"{model.role.key}.tokenizer",
    )


def answer_with(prepared: Prepared, lm: CausalLM, poll: Callable[[], None]) -> TransformersSampler:
    """A model in this process behind the Sampler protocol, without an adapter."""
    return TransformersSampler(lm, mode=None, batch_bytes=batch_bytes(prepared), poll=poll)


def answer_as_trained(
    prepared: Prepared, lm: CausalLM, trained: TrainedAdapter, poll: Callable[[], None]
) -> TransformersSampler:
    """The base in this process with an adapter of an earlier run, behind the Sampler protocol.

    Raises:
        ModelError: the adapter cannot be read or is of another model.
    """
    student = build_student(prepared, lm, poll, {}, embedded=True)
    assert student.sampler is not None, "asked for"
    if trained is not prepared.start:
        put_on(student.policy, trained)
    student.sampler.load_policy(student.policy.adapter(), version=0)
    return student.sampler


def batch_bytes(prepared: Prepared) -> int | None:
    """``sampler.batch_memory_gb`` in bytes."""
    gigabytes = prepared.config.sampler.batch_memory_gb
    return None if gigabytes is None else int(gigabytes * 1e9)


def build_policy(
    prepared: Prepared,
    student: CausalLM,
    poll: Callable[[], None],
    heads: Mapping[str, Head],
    recomputed: int,
) -> LoraPolicy:
    """The student's adapter, objective and optimizer as the config says. ``heads`` as in ``build_objective``; ``recomputed``
    layers keep no activations."""
    config = prepared.config
    trainer, model = config.trainer, config.model
    resolved = prepared.student.resolved
    policy = LoraPolicy(
        student,
        rank=model.qlora_rank,
        alpha=model.lora_alpha,
        targets=prepared.lora_targets,
        seed=config.seed,
        # An adapter outlives the folder it was trained from: a local base is named by its full path.
        base_name=str(resolved.local_dir.resolve()) if resolved.revision is None else model.path,
        base_revision=resolved.revision,
        objective=build_objective(prepared, heads),
        optimizer=OptimizerSettings(
            learning_rate=trainer.learning_rate,
            weight_decay=trainer.weight_decay,
            betas=(trainer.adam_beta1, trainer.adam_beta2),
            max_grad_norm=trainer.max_grad_norm,
            warmup_updates=trainer.warmup_steps * trainer.updates_per_batch,
            schedule=trainer.lr_schedule,
            total_updates=prepared.num_steps * trainer.updates_per_batch,
            updates_per_batch=trainer.updates_per_batch,
            value_learning_rate=config.algorithm.value_learning_rate,
        ),
        micro_batch_tokens=trainer.micro_batch_tokens,
        recomputed_layers=recomputed,
        poll=poll,
    )
    if prepared.start is not None:
        put_on(policy, prepared.start)
    return policy


def put_on(policy: LoraPolicy, trained: TrainedAdapter) -> None:
    """Give the student the weights of an adapter. Raises ModelError where it cannot be read or is of another model."""
    try:
        policy.load_adapter(trained.tensors())
    except ValueError as error:
        raise trained.refusal.error(
            f"the adapter in '{trained.folder}' does not fit its base '{trained.base}'",
            why=str(error),
            fix="name a run whose base model is as it was when the run was trained",
        ) from error


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3`` or ``cpu (2 threads)``."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
