"""Config -> sampler, teacher and policy. Which implementation serves a protocol is decided here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from rnow.algorithm.head import Head
from rnow.config.teachers import TEACHER
from rnow.disk.folder import RunFolder
from rnow.errors import RnowError
from rnow.models.card import CardWatch, ready_card
from rnow.models.loading import CausalLM
from rnow.models.shape import build_empty, shape_of
from rnow.models.sharing import why_separate
from rnow.plan.memory import ENGINE_ASLEEP
from rnow.plan.plan import Residencies, answering_teachers, choose_residencies
from rnow.plan.prepare import Prepared
from rnow.plan.roles import Role, RunModel, teachers_of
from rnow.protocols import Policy, Sampler, Teacher
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.setup.models import (
    LocalStudent,
    StudentFacts,
    answer_with,
    as_begun,
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
from rnow.teacher.privileged import PrivilegedTeacher
from rnow.teacher.router import RoutedTeacher
from rnow.training.evaluations import Answering
from rnow.training.residency import Part, Residency, Sleeper
from rnow.training.rows import NoSampler

_KEY = re.compile(r"(?<![\w./-])teacher\.(?=[a-z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """The models of a run, loaded; ``gpu.only`` wakes them.

    Attributes:
        student: what is said of the model that ``policy`` adapts.
        trainer_as_teacher: the student's own weights behind the Teacher protocol.
        teacher: of several, all of them: each sample is scored by its own.
        answering: the teachers that answer held-out prompts, for evaluation; empty where that is switched off.
        gpu: has the part awake that works, where they take turns on one card.
        sampler_facts: what the summary says of the sampler.
        poll: raises when a stop was asked for.
        plan: what was expected of the run when they were loaded, JSON-ready; empty where nothing was.
    """

    student: StudentFacts
    policy: Policy
    sampler: Sampler
    trainer_as_teacher: Teacher
    teacher: Teacher | None
    answering: Sequence[Answering]
    gpu: Residency
    sampler_facts: dict[str, str | None]
    poll: Callable[[], None]
    plan: Mapping[str, object] = field(default_factory=dict)


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
    chosen = choose_residencies(prepared, run_folder.path)
    loader = _Loader(
        prepared=prepared,
        run_folder=run_folder,
        stack=stack,
        poll=poll,
        stage=stage,
        gpu=_watched(prepared, chosen.turns) if chosen.turns else Residency(),
        chosen=chosen,
        heads={},
    )
    vllm = loader.start_sampler()
    student = await loader.load_student(vllm)
    config = prepared.config
    sampler, facts = _sampler(prepared, vllm, student)
    if loader.chosen.turns:
        facts["residency"] = "time_shared"
    teacher, answering = await loader.load_teachers(student.own_base)
    if teacher is None and config.dataset_type == "rl" and config.algorithm.kl_penalty_coef > 0:
        teacher = as_begun(prepared, student)
    if teacher is not None and prepared.rendered.teacher_token_ids:
        teacher = PrivilegedTeacher(teacher, prepared.rendered.teacher_token_ids)
    return Backends(
        student=student.facts,
        policy=student.policy,
        sampler=sampler,
        trainer_as_teacher=student.as_teacher,
        teacher=teacher,
        answering=answering,
        gpu=loader.gpu,
        sampler_facts=facts,
        poll=poll,
        plan=chosen.plan.to_dict(),
    )


def _sampler(
    prepared: Prepared, vllm: VllmSampler | None, student: LocalStudent
) -> tuple[Sampler, dict[str, str | None]]:
    """What draws the answers, and what is said of it; nothing does where the rows are learned."""
    backend = prepared.student.role.backend
    if vllm is not None:
        mode = "server" if prepared.config.sampler.url else "engine"
        return vllm, {"backend": backend, "mode": mode}
    if student.sampler is None:
        return NoSampler(), {}
    return student.sampler, {"backend": backend, "mode": f"{student.sampler.mode} weights"}


def _watched(prepared: Prepared, turns: frozenset[Part]) -> Residency:
    """Turns on the student's card, which is looked at between them."""
    device = prepared.student.role.device
    ready_card(device)
    roles = [model.role for model in prepared.models.values()]
    engines = sum(role.starts_vllm and role.part in turns for role in roles)
    return Residency(CardWatch(device, allowed=engines * ENGINE_ASLEEP).check)


@contextmanager
def naming(role: Role) -> Iterator[None]:
    """Errors that name a key of ``teacher`` name that of the teacher at work: ``teachers.math.url``."""
    try:
        yield
    except RnowError as error:
        for said in ("where", "fix"):
            if text := getattr(error, said):
                setattr(error, said, _KEY.sub(f"{role.key}.", text))
        raise


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
    chosen: Residencies
    heads: dict[str, Head]

    def start_sampler(self) -> VllmSampler | None:
        """The vLLM that draws from the student; None where the trainer's own weights do."""
        if self.prepared.student.role.backend != "vllm":
            return None
        self.stage(_coming(self.prepared.student.role))
        in_turns = "sampler" in self.chosen.turns
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
        self._tell_of_rows(lm, prepared.student.role)
        if vllm is not None:
            vllm.watch(probe_reference(lm), tolerance=trainer_tolerance(lm), warn=prepared.warn)
        student = build_student(
            prepared,
            lm,
            self.poll,
            self.heads,
            embedded=vllm is None and prepared.config.on_policy,
            recomputed=self.chosen.recomputed,
        )
        if self.chosen.turns:
            gpu.add("trainer", student.policy)
            if vllm is None:
                gpu.add("sampler", student.policy)  # which draws with the trainer's weights
            teachers = teachers_of(prepared.models)
            # Whose own base is the reference, and may be a teacher.
            for part in [m.role.part for m in teachers if m.own_base] if teachers else ["teacher"]:
                gpu.add(part, student.policy)
        return student

    async def load_teachers(self, own_base: Teacher) -> tuple[Teacher | None, Sequence[Answering]]:
        """What judges the student, and the teachers that are to be evaluated: all of them, or none where one cannot be.
        ``own_base``: the student's, where that is one of them."""
        roles = {model.role.name: model.role for model in teachers_of(self.prepared.models)}
        evaluated = self._evaluated()
        teachers: dict[str, Teacher] = {}
        answering: list[Answering] = []
        for name, role in roles.items():
            model = self.prepared.models[name]
            if model.own_base:
                teachers[name] = own_base
                continue
            with naming(role):
                teachers[name], sampler = await self._load_teacher(model, answers=name in evaluated)
            if sampler is not None:
                own = name if len(roles) > 1 else None
                answering.append(Answering(sampler=sampler, part=role.part, role=own))
        if len(answering) < len(evaluated):
            if answering:
                self.prepared.warn(
                    "nor are the other teachers: half of the answers would be nobody's"
                )
            answering = []
        if not teachers or [role.key for role in roles.values()] == [TEACHER]:
            return next(iter(teachers.values()), None), answering
        return RoutedTeacher(teachers, lambda name: self._turn(roles[name])), answering

    @asynccontextmanager
    async def _turn(self, role: Role) -> AsyncIterator[None]:
        """The card for one of several teachers; its faults are those of its own section."""
        with naming(role):
            if role.part == TEACHER:  # alone, and awake already
                yield
                return
            async with self.gpu.only(role.part):
                yield

    def _tell_of_rows(self, lm: CausalLM, role: Role) -> None:
        """What `rnow check` could not know: with these weights a prompt that several answers share must be computed with each. Of
        rows that are learned in any case: they are not packed then."""
        if lm.separate and not self.prepared.config.on_policy:
            self.prepared.note(
                f"packing is off, each row is a sequence of its own, since {lm.separate}"
            )
        elif lm.separate and lm.quantization != "int8" and why_separate(lm.model.config) is None:
            self.prepared.note(
                f"the {role.name}: prompts are computed once for each answer, since {lm.separate}"
            )

    def _evaluated(self) -> frozenset[str]:
        if not self.prepared.evaluated:
            return frozenset()
        shapes = {
            model.role.name: shape_of(
                build_empty(model.resolved, trust_remote_code=model.role.section.trust_remote_code)
            )
            for model in teachers_of(self.prepared.models)
        }
        return answering_teachers(self.prepared, shapes, self.chosen.streamed)

    async def _load_teacher(
        self, model: RunModel, *, answers: bool
    ) -> tuple[Teacher, Sampler | None]:
        """A teacher, and what answers with it where it is to be evaluated."""
        prepared, name, part = self.prepared, model.role.name, model.role.part
        by_vllm, in_turns = model.role.backend == "vllm", part in self.chosen.turns
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
                answers=answers,
            )
            if answers:
                answering = teacher_sampler(prepared, model, teacher)
        else:
            cards = prepared.cards.get(name, ())
            streamed = name in self.chosen.streamed
            if streamed and model.role.residency == "auto":
                prepared.note(
                    f"the {name} does not fit whole: its layers are read from its files as they are needed"
                )
            lm = load_model(model, prepared.rendered, cards=cards, streamed=streamed)
            self._tell_of_rows(lm, model.role)
            teacher = score_with(prepared, lm, self.poll, role=name)
            self.heads[name] = lm.head
            if answers:
                answering = answer_with(prepared, lm, self.poll)
        if in_turns:
            assert isinstance(teacher, Sleeper), "only what runs here takes turns"
            self.gpu.add(part, teacher)
        return read_across(prepared, model, teacher), answering
