"""Config -> sampler, teacher and policy. Which implementation serves a protocol is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rnow.models.loading import CausalLM
from rnow.policy.student import LoraPolicy, Objective, OptimizerSettings
from rnow.protocols import Sampler, Teacher
from rnow.run.models import load_student, load_teacher_model
from rnow.run.parts import batch_bytes
from rnow.run.prepare import Prepared
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher.transformers import TransformersTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """The models of a run, awake.

    Attributes:
        student: the base that ``policy`` adapts.
        trainer_as_teacher: the student's own weights behind the Teacher protocol.
        teacher_sampler: answers with the teacher, for evaluation; None where that is switched off.
        sampler_facts: what the summary says of the sampler.
    """

    student: CausalLM
    policy: LoraPolicy
    sampler: Sampler
    trainer_as_teacher: Teacher
    teacher: Teacher | None
    teacher_sampler: Sampler | None
    sampler_facts: dict[str, str | None]


def load_backends(
    prepared: Prepared, *, poll: Callable[[], None], announce: Callable[[str], None]
) -> Backends:
    """Load the models that the config names.

    Args:
        poll: called at safe points while models work; may raise to stop.
        announce: told what is being loaded.

    Raises:
        ModelError: a model cannot be loaded.
    """
    config = prepared.config
    vocabulary = prepared.preflight.vocabulary
    announce("loading the student")
    student = load_student(config, prepared.student, vocabulary)
    # The sampler first: in merged mode it copies the base as it is before PEFT wraps it.
    sampler = TransformersSampler.for_student(student, batch_bytes=batch_bytes(prepared), poll=poll)
    policy = build_policy(prepared, student, poll)

    def as_teacher(lm: CausalLM) -> TransformersTeacher:
        return TransformersTeacher(
            lm,
            temperature=config.rollout.temperature,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
            poll=poll,
        )

    teacher = teacher_sampler = None
    if prepared.teacher is not None and config.teacher is not None:
        announce("loading the teacher")
        lm = load_teacher_model(config.teacher, prepared.teacher, vocabulary)
        teacher = as_teacher(lm)
        if config.evaluation.teacher:
            teacher_sampler = TransformersSampler(
                lm, mode=None, batch_bytes=batch_bytes(prepared), poll=poll
            )
    return Backends(
        student=student,
        policy=policy,
        sampler=sampler,
        trainer_as_teacher=as_teacher(student),
        teacher=teacher,
        teacher_sampler=teacher_sampler,
        sampler_facts={"backend": "transformers", "mode": sampler.mode},
    )


def build_policy(prepared: Prepared, student: CausalLM, poll: Callable[[], None]) -> LoraPolicy:
    """The student's adapter, objective and optimizer as the config says."""
    config = prepared.config
    algorithm, trainer, model = config.algorithm, config.trainer, config.model
    checkpointing = trainer.gradient_checkpointing
    local = prepared.student.source == "local"
    return LoraPolicy(
        student,
        rank=model.qlora_rank,
        alpha=model.lora_alpha,
        seed=config.seed,
        # An adapter outlives the folder it was trained from: a local base is named by its full path.
        base_name=str(prepared.student.local_dir.resolve()) if local else model.path,
        objective=Objective(
            loss_fn=algorithm.loss_fn,
            kl_penalty_coef=algorithm.kl_penalty_coef,
            reward_coef=algorithm.reward_coef,
            kl_clamp=algorithm.kl_clamp,
            clip_ratio_low=algorithm.clip_ratio_low,
            clip_ratio_high=algorithm.clip_ratio_high,
            ratio_cap=algorithm.ratio_cap,
            temperature=config.rollout.temperature,
        ),
        optimizer=OptimizerSettings(
            learning_rate=trainer.learning_rate,
            weight_decay=trainer.weight_decay,
            betas=(trainer.adam_beta1, trainer.adam_beta2),
            max_grad_norm=trainer.max_grad_norm,
            warmup_steps=trainer.warmup_steps,
            schedule=trainer.lr_schedule,
            total_updates=prepared.num_steps * trainer.updates_per_batch,
            updates_per_batch=trainer.updates_per_batch,
        ),
        micro_batch_tokens=trainer.micro_batch_tokens,
        gradient_checkpointing=(
            student.device.type == "cuda" if checkpointing == "auto" else bool(checkpointing)
        ),
        poll=poll,
    )
