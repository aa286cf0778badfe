"""Config -> sampler, teacher and policy. Which implementation serves a protocol is decided here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.disk.folder import RunFolder
from rnow.errors import ConfigError, ModelError
from rnow.models.loading import CausalLM, choose_device, take_apart
from rnow.models.offload import tensors_of
from rnow.models.resolve import ResolvedModel
from rnow.plan.choices import (
    dtype_name,
    sampler_backend,
    sampler_format,
    student_share,
    teacher_backend,
    teacher_share,
)
from rnow.plan.plan import taking_turns
from rnow.plan.prepare import Prepared
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.protocols import Sampler, Teacher
from rnow.sampling.transformers import TransformersSampler
from rnow.setup.models import load_student, load_teacher_model
from rnow.setup.parts import batch_bytes
from rnow.teacher.base import BaseTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.training.residency import Residency

if TYPE_CHECKING:
    from rnow.sampling.vllm_probe import Reference
    from rnow.sampling.vllm_sampler import VllmSampler
    from rnow.teacher.vllm import VllmTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """The models of a run, loaded; ``gpu.only`` wakes them.

    Attributes:
        student: the base that ``policy`` adapts.
        trainer_as_teacher: the student's own weights behind the Teacher protocol.
        teacher_sampler: answers with the teacher, for evaluation; None where that is switched off.
        gpu: has the part awake that works, where they take turns on one card.
        sampler_facts: what the summary says of the sampler.
        poll: raises when a stop was asked for.
    """

    student: CausalLM
    policy: LoraPolicy
    sampler: Sampler
    trainer_as_teacher: Teacher
    teacher: Teacher | None
    teacher_sampler: Sampler | None
    gpu: Residency
    sampler_facts: dict[str, str | None]
    poll: Callable[[], None]


async def load_backends(
    prepared: Prepared,
    run_folder: RunFolder,
    stack: ExitStack,
    *,
    poll: Callable[[], None],
    stage: Callable[[str], None],
) -> Backends:
    """Load the models that the config names, and start the processes that serve them.

    Args:
        run_folder: for the logs of vLLM processes, and the adapters they load.
        stack: closes what was started.
        poll: called at safe points while models work; may raise to stop.
        stage: told what is being loaded.

    Raises:
        ModelError: a model cannot be loaded or served.
        ConfigError: settings that exclude each other.
    """
    config = prepared.config
    vocabulary = prepared.preflight.vocabulary
    gpu, turns = Residency(), taking_turns(prepared, run_folder.path)
    vllm = None
    if sampler_backend(config) == "vllm":
        stage("starting vLLM for the student")
        vllm = build_vllm_sampler(prepared, run_folder, time_shared="sampler" in turns)
        stack.callback(vllm.close)
        started = vllm.start()
        if choose_device(config.model.device).type == "cuda":
            # vLLM measures what is free on the card while it starts: nobody else may be loading meanwhile.
            started.result()
        if "sampler" in turns:
            gpu.add("sampler", vllm)
    facts: dict[str, str | None]
    sampler: Sampler
    await gpu.clear()
    stage("loading the student")
    student = load_student(config, prepared.student, vocabulary)
    if vllm is not None:
        kind = "server" if config.sampler.url else "engine"
        sampler, facts = vllm, {"backend": "vllm", "mode": kind}
        vllm.watch(probe_reference(student), tolerance=trainer_tolerance(student))
        policy = build_policy(prepared, student, poll)
    else:
        # Before the policy: in merged mode it copies the base as it is before PEFT wraps it.
        embedded = TransformersSampler.for_student(
            student, batch_bytes=batch_bytes(prepared), poll=poll
        )
        sampler, facts = embedded, {"backend": "transformers", "mode": f"{embedded.mode} weights"}
        policy = build_policy(prepared, student, poll)
        policy.take_along(lambda: tensors_of(embedded.model))
    if turns:
        facts["residency"] = "time_shared"
        gpu.add("trainer", policy)
        if vllm is None:
            gpu.add("sampler", policy)  # which draws with the trainer's weights
        if prepared.teacher is None:
            gpu.add("teacher", policy)  # whose own base is the reference

    def as_teacher(lm: CausalLM) -> TransformersTeacher:
        return TransformersTeacher(
            lm,
            temperature=config.rollout.temperature,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
            poll=poll,
        )

    teacher: Teacher | None = None
    teacher_sampler: Sampler | None = None
    if prepared.teacher is not None and config.teacher is not None:
        if teacher_backend(config.teacher) == "vllm":
            stage("starting vLLM for the teacher")
            if in_turns := "teacher" in turns:
                await gpu.clear()
            served = await _start_vllm_teacher(
                prepared, prepared.teacher, run_folder, stack, poll, time_shared=in_turns
            )
            teacher = served
            if in_turns:
                gpu.add("teacher", served)
            if config.evaluation.teacher:
                teacher_sampler = _served_teacher_sampler(prepared, prepared.teacher, served)
        else:
            stage("loading the teacher")
            if "teacher" in turns:
                await gpu.clear()
            lm = load_teacher_model(config.teacher, prepared.teacher, vocabulary)
            teacher = loaded = as_teacher(lm)
            if "teacher" in turns:
                gpu.add("teacher", loaded)
            if config.evaluation.teacher:
                teacher_sampler = TransformersSampler(
                    lm, mode=None, batch_bytes=batch_bytes(prepared), poll=poll
                )
    elif config.dataset_type == "rl" and config.algorithm.kl_penalty_coef > 0:
        teacher = BaseTeacher(as_teacher(student), policy.model.disable_adapter)
    return Backends(
        student=student,
        policy=policy,
        sampler=sampler,
        trainer_as_teacher=as_teacher(student),
        teacher=teacher,
        teacher_sampler=teacher_sampler,
        gpu=gpu,
        sampler_facts=facts,
        poll=poll,
    )


def probe_reference(student: CausalLM) -> Reference:
    """The trainer's side of a probe: the student with its adapter as it is, at temperature 1."""
    cut = TransformersTeacher(student)
    whole = TransformersTeacher(take_apart(student.model, vocabulary=sys.maxsize))

    def score(token_ids: Sequence[int], masked: bool) -> list[float]:
        found = (cut if masked else whole).compute_logprobs(token_ids)
        return [value for value in found if value is not None]

    return score


def trainer_tolerance(student: CausalLM) -> float:
    """How far vLLM may be off for the way in which the trainer holds the student."""
    from rnow.sampling.vllm_probe import tolerance_of

    dtype = str(student.head.weight.dtype).removeprefix("torch.")
    return tolerance_of(dtype, student.quantization).trainer


def probe_ids(prepared: Prepared) -> tuple[int, ...]:
    """The beginning of the run's first prompt; nothing where the window holds no two tokens and one more."""
    from rnow.sampling.vllm_probe import MAX_PROBE_TOKENS

    preflight = prepared.preflight
    first = next(iter(preflight.prompt_token_ids.values()), ())
    ids = tuple(first[: min(MAX_PROBE_TOKENS, preflight.window - 1)])
    return ids if len(ids) > 1 else ()


def build_vllm_sampler(
    prepared: Prepared, run_folder: RunFolder, *, time_shared: bool = False
) -> VllmSampler:
    """The vLLM sampler of the config; nothing is started yet.

    Args:
        time_shared: it takes turns on its card, and must be able to sleep.
    """
    from rnow.sampling.vllm_engine import VllmEngineSampler
    from rnow.sampling.vllm_server import VllmServerSampler
    from rnow.sampling.vllm_settings import VllmSettings

    config, section = prepared.config, prepared.config.sampler
    if section.url is None and find_spec("vllm") is None:
        raise ConfigError(
            "sampler.backend is vllm, but vLLM is not installed here",
            where="sampler.backend",
            fix="pip install 'rnow-local[vllm]', or set sampler.backend: transformers",
        )
    device = choose_device(config.model.device)
    quantization, dtype = sampler_format(config)
    settings = VllmSettings(
        local_dir=prepared.student.local_dir,
        vocabulary=prepared.preflight.vocabulary,
        work_dir=run_folder.path / "vllm",
        log=run_folder.path / "vllm-student.log",
        dtype=dtype,
        quantization=quantization,
        max_model_len=prepared.preflight.window,
        gpu_memory_utilization=student_share(config, time_shared=time_shared),
        max_num_seqs=section.max_num_seqs,
        tensor_parallel_size=section.tensor_parallel_size,
        enforce_eager=section.enforce_eager or device.type == "cpu",
        enable_prefix_caching=section.enable_prefix_caching,
        enable_sleep=time_shared,
        trust_remote_code=config.model.trust_remote_code,
        max_lora_rank=config.model.qlora_rank,
        probe=probe_ids(prepared),
    )
    if section.url is None:
        return VllmEngineSampler(settings)
    return VllmServerSampler(
        settings,
        url=section.url,
        api_key=prepared.secret("RNOW_SAMPLER_API_KEY"),
        served_model=section.served_model,
    )


async def _start_vllm_teacher(
    prepared: Prepared,
    resolved: ResolvedModel,
    run_folder: RunFolder,
    stack: ExitStack,
    poll: Callable[[], None],
    *,
    time_shared: bool,
) -> VllmTeacher:
    from rnow.teacher.vllm import API_KEY_VARIABLE, VllmTeacher
    from rnow.teacher.vllm_server import Asking, TeacherServerSettings

    section, preflight = prepared.config.teacher, prepared.preflight
    assert section is not None
    temperature = prepared.config.rollout.temperature
    if section.url is not None:
        teacher = VllmTeacher.served(
            section.url,
            section.served_model,
            temperature=temperature,
            api_key=prepared.secret(API_KEY_VARIABLE),
            asking=Asking(poll=poll),
        )
    else:
        device = choose_device(section.device)
        settings = TeacherServerSettings(
            local_dir=resolved.local_dir,
            log=run_folder.path / "vllm-teacher.log",
            dtype=dtype_name(section.dtype, device),
            quantization=section.quantization,
            tensor_parallel_size=section.tensor_parallel_size,
            gpu_memory_utilization=teacher_share(prepared.config, time_shared=time_shared),
            enable_sleep=time_shared,
            max_num_batched_tokens=section.max_num_batched_tokens,
            max_model_len=preflight.window,
            trust_remote_code=section.trust_remote_code,
            samples=prepared.config.evaluation.teacher and bool(prepared.project.dataset.held_out),
        )
        teacher = VllmTeacher.managed(settings, temperature=temperature, poll=poll)
        stack.callback(teacher.close)
    await teacher.start()
    found = await teacher.check(preflight.tokenizer, preflight.vocabulary, longest=preflight.window)
    for text in found.warnings:
        prepared.warn(text)
    if found.padding_mass:
        prepared.warn(
            f"the served teacher gives {found.padding_mass:.2e} of its probability to padding ids on average; "
            "its log-probabilities are too low by about that much"
        )
    return teacher


def _served_teacher_sampler(
    prepared: Prepared, resolved: ResolvedModel, teacher: VllmTeacher
) -> Sampler | None:
    from rnow.sampling.vllm_server import padded_ids
    from rnow.teacher.vllm_sampler import VllmTeacherSampler

    vocabulary = prepared.preflight.vocabulary
    try:
        return VllmTeacherSampler(
            teacher, vocabulary=vocabulary, padding=padded_ids(resolved.local_dir, vocabulary)
        )
    except ModelError as error:
        prepared.warn(f"the teacher itself is not evaluated: {error.message}")
        return None


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
        objective=PolicyGradient(
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
