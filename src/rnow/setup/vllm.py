"""The models that vLLM serves: starting it, and asking whether it has the right weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rnow.config import TeacherSection, full_address
from rnow.config.teachers import API_KEY, key_variable
from rnow.disk.folder import RunFolder
from rnow.errors import ModelError
from rnow.models.loading import CausalLM, take_apart
from rnow.models.tokenizer import config_value
from rnow.plan.prepare import Prepared
from rnow.plan.roles import STUDENT, RunModel, dtype_name, engine_share
from rnow.protocols import Sampler
from rnow.sampling.vllm_backend import Backend
from rnow.sampling.vllm_engine import EngineBackend
from rnow.sampling.vllm_probe import MAX_PROBE_TOKENS, Reference, tolerance_of
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_server import ServerBackend, padded_ids
from rnow.sampling.vllm_settings import VllmSettings
from rnow.setup.objective import build_objective
from rnow.teacher.served import Asking, ServedTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_sampler import VllmTeacherSampler
from rnow.teacher.vllm_server import TeacherServerSettings


def start_vllm_sampler(
    prepared: Prepared, run_folder: RunFolder, stack: ExitStack, *, time_shared: bool
) -> VllmSampler:
    """The vLLM that draws from the student, starting or started; ``stack`` closes it.

    Args:
        time_shared: it takes turns on its card, and must be able to sleep.
    """
    section = prepared.config.sampler
    settings = sampler_settings(prepared, run_folder, time_shared=time_shared)
    backend: Backend = EngineBackend(settings)
    if section.url is not None:
        backend = ServerBackend(
            settings,
            url=full_address(section.url),
            api_key=prepared.secret("RNOW_SAMPLER_API_KEY"),
            served_model=section.served_model,
        )
    sampler = VllmSampler(backend)
    stack.callback(sampler.close)
    started = sampler.start()
    if prepared.student.role.device.type == "cuda":
        # vLLM measures what is free on the card while it starts: no other model may be loading meanwhile.
        started.result()
    return sampler


def sampler_settings(
    prepared: Prepared, run_folder: RunFolder, *, time_shared: bool
) -> VllmSettings:
    """What the config says to the student's vLLM. A key that only the engine reads goes into ``engine``, under its name in
    vLLM."""
    config, section, student = prepared.config, prepared.config.sampler, prepared.student
    quantization, dtype = student.role.serving_format
    assert quantization in ("none", "nf4"), "no setting of the student or the sampler"
    return VllmSettings(
        local_dir=student.resolved.local_dir,
        vocabulary=prepared.rendered.vocabulary,
        work_dir=run_folder.path / "vllm",
        log=run_folder.path / "vllm-student.log",
        dtype=dtype,
        quantization=quantization,
        max_model_len=prepared.rendered.window,
        gpu_memory_utilization=engine_share(student.role, student.role, time_shared=time_shared),
        max_num_seqs=section.max_num_seqs,
        engine={
            "tensor_parallel_size": section.tensor_parallel_size,
            "enforce_eager": section.enforce_eager or student.role.device.type == "cpu",
            "enable_prefix_caching": section.enable_prefix_caching,
        },
        cards=prepared.cards.get(STUDENT, ()),
        enable_sleep=time_shared,
        trust_remote_code=config.model.trust_remote_code,
        max_lora_rank=config.model.qlora_rank,
        probe=probe_ids(prepared),
        measured=not student.role.on_gpu,
        gaps=run_folder.path / "vllm-probes.jsonl",
    )


async def start_vllm_teacher(
    prepared: Prepared,
    model: RunModel,
    run_folder: RunFolder,
    stack: ExitStack,
    poll: Callable[[], None],
    *,
    time_shared: bool,
    answers: bool,
) -> ServedTeacher:
    """The server that scores with the teacher, a vLLM of ours or one that runs already, checked; ``stack`` closes one of ours.
    Raises ModelError when it cannot be used.

    Args:
        time_shared: it takes turns on its card, and must be able to sleep.
        answers: it will answer prompts too.
    """
    role, section, rendered = model.role, model.role.serving, prepared.rendered
    assert isinstance(section, TeacherSection)
    temperature = prepared.config.rollout.temperature
    top_k = build_objective(prepared).needs.top_k
    if section.url is not None:
        teacher = ServedTeacher.at(
            full_address(section.url),
            section.served_model,
            protocol=section.protocol,
            temperature=temperature,
            api_key=prepared.secret(key_variable(model.role.name)) or prepared.secret(API_KEY),
            asking=Asking(poll=poll, top_k=top_k),
        )
    else:
        settings = _teacher_settings(
            prepared, model, run_folder, time_shared=time_shared, answers=answers
        )
        teacher = VllmTeacher.managed(settings, temperature=temperature, top_k=top_k, poll=poll)
        stack.callback(teacher.close)
        await teacher.start()
    found = await teacher.check(
        rendered.tokenizer_of(role.name),
        rendered.vocabulary_of(role.name),
        longest=rendered.window_of(role.name),
        rows=config_value(model.resolved.local_dir, "vocab_size"),
    )
    if section.url is not None:
        prepared.note(f"the teacher's server: {found.summary}")
    for text in found.warnings:
        prepared.warn(text)
    if found.padding_mass:
        prepared.warn(
            f"the served {model.role.name} gives {found.padding_mass:.2e} of its probability to padding ids on average; "
            "its log-probabilities are too low by about that much"
        )
    return teacher


def _teacher_settings(
    prepared: Prepared,
    model: RunModel,
    run_folder: RunFolder,
    *,
    time_shared: bool,
    answers: bool,
) -> TeacherServerSettings:
    """What the config says to a teacher's vLLM that this run starts."""
    role, section = model.role, model.role.serving
    assert isinstance(section, TeacherSection)
    quantization, dtype = role.serving_format
    return TeacherServerSettings(
        local_dir=model.resolved.local_dir,
        log=run_folder.path / f"vllm-{re.sub(r'[^A-Za-z0-9_-]', '-', role.name)}.log",
        dtype=dtype,
        quantization=quantization,
        tensor_parallel_size=section.tensor_parallel_size,
        gpu_memory_utilization=engine_share(role, prepared.student.role, time_shared=time_shared),
        cards=prepared.cards.get(role.name, ()),
        enable_sleep=time_shared,
        max_num_batched_tokens=section.max_num_batched_tokens,
        max_model_len=prepared.rendered.window_of(role.name),
        trust_remote_code=section.trust_remote_code,
        samples=answers,
    )


def answer_with_served(prepared: Prepared, model: RunModel, teacher: ServedTeacher) -> Sampler:
    """Answers with a served teacher. Raises ModelError where its server cannot."""
    vocabulary = prepared.rendered.vocabulary
    return VllmTeacherSampler(
        teacher,
        vocabulary=vocabulary,
        padding=padded_ids(model.resolved.local_dir, vocabulary),
    )


def teacher_sampler(prepared: Prepared, model: RunModel, teacher: ServedTeacher) -> Sampler | None:
    """Answers with a served teacher; None, and a warning, where its server cannot."""
    try:
        return answer_with_served(prepared, model, teacher)
    except ModelError as error:
        prepared.warn(f"the {model.role.name} itself is not evaluated: {error.message}")
        return None


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
    return tolerance_of(dtype_name(student.head.weight.dtype), student.quantization).trainer


def probe_ids(prepared: Prepared) -> tuple[int, ...]:
    """The beginning of the run's first prompt; nothing where the window holds no two tokens and one more."""
    rendered = prepared.rendered
    first = next(iter(rendered.prompt_token_ids.values()), ())
    ids = tuple(first[: min(MAX_PROBE_TOKENS, rendered.window - 1)])
    return ids if len(ids) > 1 else ()
