"""Config -> sampler, teacher and policy. Which implementation serves a protocol is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from rnow.algorithm.head import Head
from rnow.disk.folder import RunFolder
from rnow.models.card import CardWatch, ready_card
from rnow.models.shape import build_empty, shape_of
from rnow.plan.choices import teacher_answers
from rnow.plan.memory import ENGINE_ASLEEP
from rnow.plan.plan import taking_turns
from rnow.plan.prepare import Prepared
from rnow.plan.roles import TEACHER, Role, RunModel
from rnow.protocols import Policy, Sampler, Teacher
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.setup.models import (
    LocalStudent,
    StudentFacts,
    answer_with,
    build_student,
    load_model,
    read_across,
    score_with,
)
from rnow.setup.vllm import (
    probe_reference,
    start_vllm_sampler,
    start_vllm_teacher,
    teacher_sampler,
    trainer_tolerance,
)
from rnow.training.residency import Part, Residency, Sleeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """The models of a run, loaded; ``gpu.only`` wakes them.

    Attributes:
        student: what is said of the model that ``policy`` adapts.
        trainer_as_teacher: the student's own weights behind the Teacher protocol.
        teacher_sampler: answers with the teacher, for evaluation; None where that is switched off.
        gpu: has the part awake that works, where they take turns on one card.
        sampler_facts: what the summary says of the sampler.
        poll: raises when a stop was asked for.
    """

    student: StudentFacts
    policy: Policy
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
    turns = taking_turns(prepared, run_folder.path)
    loader = _Loader(
        prepared=prepared,
        run_folder=run_folder,
        stack=stack,
        poll=poll,
        stage=stage,
        gpu=_watched(prepared, turns) if turns else Residency(),
        turns=turns,
        heads={},
    )
    vllm = loader.start_sampler()
    student = await loader.load_student(vllm)
    config = prepared.config
    sampler: Sampler
    if vllm is not None:
        sampler, mode = vllm, "server" if config.sampler.url else "engine"
    else:
        assert student.sampler is not None, "built where no vLLM draws"
        sampler, mode = student.sampler, f"{student.sampler.mode} weights"
    facts: dict[str, str | None] = {"backend": prepared.student.role.backend, "mode": mode}
    if loader.turns:
        facts["residency"] = "time_shared"
    teacher, answering = None, None
    if TEACHER in prepared.models:
        teacher, answering = await loader.load_teacher(prepared.models[TEACHER])
    elif config.dataset_type == "rl" and config.algorithm.kl_penalty_coef > 0:
        teacher = student.reference
    return Backends(
        student=student.facts,
        policy=student.policy,
        sampler=sampler,
        trainer_as_teacher=student.as_teacher,
        teacher=teacher,
        teacher_sampler=answering,
        gpu=loader.gpu,
        sampler_facts=facts,
        poll=poll,
    )


def _watched(prepared: Prepared, turns: frozenset[Part]) -> Residency:
    """Turns on the student's card, which is looked at between them."""
    device = prepared.student.role.device
    ready_card(device)
    roles = [model.role for model in prepared.models.values()]
    engines = sum(role.starts_vllm and role.part in turns for role in roles)
    return Residency(CardWatch(device, allowed=engines * ENGINE_ASLEEP).check)


def _coming(role: Role) -> str:
    """The stage in which the vLLM of a role gets ready."""
    if role.starts_vllm:
        return f"starting vLLM for the {role.name}"
    return f"asking the {role.name}'s server"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loader:
    """Loads one model after the other. Where they take turns on a card, the loaded ones sleep meanwhile. ``heads``: of those in
    this process, by role."""

    prepared: Prepared
    run_folder: RunFolder
    stack: ExitStack
    poll: Callable[[], None]
    stage: Callable[[str], None]
    gpu: Residency
    turns: frozenset[Part]
    heads: dict[str, Head]

    def start_sampler(self) -> VllmSampler | None:
        """The vLLM that draws from the student; None where the trainer's own weights do."""
        if self.prepared.student.role.backend != "vllm":
            return None
        self.stage(_coming(self.prepared.student.role))
        in_turns = "sampler" in self.turns
        vllm = start_vllm_sampler(self.prepared, self.run_folder, self.stack, time_shared=in_turns)
        if in_turns:
            self.gpu.add("sampler", vllm)
        return vllm

    async def load_student(self, vllm: VllmSampler | None) -> LocalStudent:
        """The student, with an embedded sampler where no vLLM draws."""
        prepared, gpu = self.prepared, self.gpu
        await gpu.clear()
        self.stage("loading the student")
        lm = load_model(prepared.student, prepared.rendered)
        if vllm is not None:
            vllm.watch(probe_reference(lm), tolerance=trainer_tolerance(lm), warn=prepared.warn)
        student = build_student(prepared, lm, self.poll, self.heads, embedded=vllm is None)
        if self.turns:
            gpu.add("trainer", student.policy)
            if vllm is None:
                gpu.add("sampler", student.policy)  # which draws with the trainer's weights
            if TEACHER not in prepared.models:
                gpu.add("teacher", student.policy)  # whose own base is the reference
        return student

    async def load_teacher(self, model: RunModel) -> tuple[Teacher, Sampler | None]:
        """A teacher, and what answers with it where it is to be evaluated."""
        prepared, name, part = self.prepared, model.role.name, model.role.part
        by_vllm, in_turns = model.role.backend == "vllm", part in self.turns
        trust = model.role.section.trust_remote_code
        evaluated = bool(prepared.project.dataset.held_out) and teacher_answers(
            prepared.config,
            shape_of(build_empty(model.resolved, trust_remote_code=trust)),
        )
        self.stage(_coming(model.role) if by_vllm else f"loading the {name}")
        if in_turns:
            await self.gpu.clear()
        answering = None
        if by_vllm:
            teacher = await start_vllm_teacher(
                prepared,
                model,
                self.run_folder,
                self.stack,
                self.poll,
                time_shared=in_turns,
                answers=evaluated,
            )
            if evaluated:
                answering = teacher_sampler(prepared, model, teacher)
        else:
            cards = prepared.cards.get(name, ())
            lm = load_model(model, prepared.rendered, cards=cards)
            teacher = score_with(prepared, lm, self.poll, role=name)
            self.heads[name] = lm.head
            if evaluated:
                answering = answer_with(prepared, lm, self.poll)
        if in_turns:
            assert isinstance(teacher, Sleeper), "only what runs here takes turns"
            self.gpu.add(part, teacher)
        return read_across(prepared, model, teacher), answering
