"""The models of a run by role: which section of the config says what about each, and what ``auto`` means there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rnow.config import Config, ModelSection, SamplerSection, TeacherSection
from rnow.config.problems import dotted
from rnow.config.teachers import TEACHER, find_teachers
from rnow.models.loading import Quantization, choose_device, choose_dtype, stored_quantization
from rnow.models.resolved import ResolvedModel
from rnow.plan.choices import sampler_backend, teacher_backend
from rnow.training.residency import Part

if TYPE_CHECKING:
    import torch

Stored = Quantization | Literal["fp8"]
"""How weights are stored: fp8 by a vLLM alone."""

STUDENT = "student"

OWN_CARD = 0.9
SHARED_CARD = 0.35
"""vLLM's share of a card that the trainer, and perhaps the teacher, use too."""
CARD_IN_TURNS = 0.8
"""vLLM's share of a card that it has in turns with them: what sleeps leaves a little behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What the config says of one model of the run.

    Attributes:
        name: ``student``, ``teacher`` or ``teacher/<name>``.
        key: the config section that describes the model; ``model.path`` names the student.
        section: that section.
        serving_key: the config section that says what answers or scores with it.
        serving: that section; a teacher's own.
        backend: what answers or scores with it, ``auto`` decided.
        device_map: its placement over several devices, if it has one.
        part: who has the card while it answers or scores.
    """

    name: str
    key: str
    section: ModelSection | TeacherSection
    serving_key: str
    serving: SamplerSection | TeacherSection
    backend: Literal["transformers", "vllm"]
    device_map: str | None
    part: Part

    @property
    def trained(self) -> bool:
        """Whether the run changes it: the trainer holds its weights, whatever samples from it."""
        return self.name == STUDENT

    @property
    def needs_weights(self) -> bool:
        """Whether its weights are read on this machine: of a model that only a server elsewhere holds, the tokenizer is
        enough."""
        return self.trained or self.serving.url is None

    @property
    def starts_vllm(self) -> bool:
        """Whether the run starts a vLLM for it, rather than loading it or asking a server that already runs."""
        return self.backend == "vllm" and self.serving.url is None

    @property
    def crosses(self) -> bool:
        """Whether it reads with a tokenizer of its own: its ids are not the student's."""
        return isinstance(self.section, TeacherSection) and self.section.tokenizer == "cross"

    @property
    def residency(self) -> Literal["auto", "resident", "streamed"]:
        """Where its layers are to be; a student's are in memory."""
        section = self.section
        return section.residency if isinstance(section, TeacherSection) else "resident"

    @property
    def device(self) -> torch.device:
        """Where it is loaded. Raises ModelError for a device that does not exist."""
        return choose_device(self.section.device, key=f"{self.key}.device")

    @property
    def dtype(self) -> torch.dtype:
        """Of its unquantised numbers."""
        return choose_dtype(self.section.dtype, self.device)

    @property
    def quantization(self) -> Stored:
        """How its weights are stored, ``auto`` decided."""
        chosen = self.section.quantization
        if chosen == "auto":
            return "nf4" if self.device.type == "cuda" else "none"
        return chosen

    @property
    def serving_format(self) -> tuple[Stored, str]:
        """Quantization, and dtype as vLLM spells it, in which a vLLM is to hold it: its own, unless the config says
        otherwise."""
        serving = self.serving
        quantization = self.quantization if serving.quantization == "auto" else serving.quantization
        named = self.section.dtype if serving.dtype == "auto" else serving.dtype
        return quantization, dtype_name(choose_dtype(named, self.device))

    @property
    def card(self) -> str:
        """Its device by one name: ``cuda`` is ``cuda:0``."""
        name = str(self.device)
        return "cuda:0" if name == "cuda" else name

    @property
    def on_gpu(self) -> bool:
        """Whether it is, or its vLLM runs, on a CUDA card."""
        return self.device.type == "cuda"

    @property
    def index(self) -> int:
        """The card's number, as torch counts those it sees."""
        return self.device.index or 0

    @property
    def spread(self) -> int:
        """Over how many cards a vLLM of ours runs; 1 without one."""
        return self.serving.tensor_parallel_size if self.starts_vllm else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """One model of the run: its role and its files.

    Attributes:
        own_base: a teacher that is the student's base with the adapter switched off: the trainer holds it, and no other copy
            is loaded.
    """

    role: Role
    resolved: ResolvedModel
    own_base: bool = False

    @property
    def quantization(self) -> Stored:
        """How its weights are held: as they are stored, else as the config says. Raises ModelError for a format that
        cannot be read."""
        return stored_quantization(self.resolved.local_dir) or self.role.quantization


Models = Mapping[str, RunModel]
"""The models of a run by the names of their roles, the student first."""


def roles_of(config: Config) -> dict[str, Role]:
    """The roles of a run by name, the student first, then every teacher that the config names."""
    student = Role(
        name=STUDENT,
        key="model",
        section=config.model,
        serving_key="sampler",
        serving=config.sampler,
        backend=sampler_backend(config),
        device_map=None,
        part="sampler",
    )
    teachers = {
        name: _teacher(name, dotted(key), _as_student(section, student))
        for name, (key, section) in find_teachers(config).sections.items()
    }
    return {STUDENT: student, **teachers}


def _teacher(name: str, key: str, section: TeacherSection) -> Role:
    return Role(
        name=name,
        key=key,
        section=section,
        serving_key=key,
        serving=section,
        backend=teacher_backend(section),
        device_map=section.device_map,
        part=TEACHER,
    )


def _as_student(section: TeacherSection, student: Role) -> TeacherSection:
    """``path: self`` as a section that loads what the student's base is, as it is loaded; any other as it is."""
    if not section.own_base:
        return section
    mine = student.section
    names = ("path", "revision", "dtype", "device", "attn_implementation", "trust_remote_code")
    same = {name: getattr(mine, name) for name in names}
    return section.model_copy(
        update={**same, "quantization": student.quantization, "device_map": None}
    )


def used_roles(roles: Mapping[str, Role], judges: Collection[str | None]) -> dict[str, Role]:
    """The student and those of the teachers that judge somebody. Where there are several, each has the card in its own turn."""
    used = {name: role for name, role in roles.items() if role.trained or name in judges}
    if len(used) <= 2:
        return used
    return {
        name: role
        if role.trained
        else replace(role, part=f"{TEACHER}/{name.removeprefix(f'{TEACHER}/')}")
        for name, role in used.items()
    }


def teachers_of(models: Models) -> list[RunModel]:
    """The models that judge the student."""
    return [model for model in models.values() if not model.role.trained]


def to_fetch(models: Iterable[RunModel]) -> list[tuple[RunModel, int]]:
    """The models of which something has yet to come from the hub, each with its bytes; one that has two roles counts once."""
    coming: dict[tuple[str, str | None], tuple[RunModel, int]] = {}
    for model in models:
        resolved = model.resolved
        if model.role.needs_weights and resolved.missing_bytes:
            coming.setdefault((resolved.path, resolved.revision), (model, resolved.missing_bytes))
    return list(coming.values())


def shares_base(teacher: RunModel, student: RunModel) -> bool:
    """Whether a teacher is what the trainer holds anyway: the student's files, loaded alike on the same device."""
    mine, its = student.role, teacher.role
    here = its.backend == "transformers" and its.device_map is None
    return (
        here
        and student.resolved.local_dir.resolve() == teacher.resolved.local_dir.resolve()
        and (student.quantization, mine.dtype, mine.card)
        == (teacher.quantization, its.dtype, its.card)
        and mine.section.attn_implementation == its.section.attn_implementation
        and mine.section.trust_remote_code == its.section.trust_remote_code
    )


def engine_share(role: Role, student: Role, *, time_shared: bool) -> float:
    """The share of its card that a vLLM of ours takes: ``gpu_memory_utilization``, or its default. Spread over several
    cards, or on another than the student's, it has them to itself."""
    alone = role.serving.tensor_parallel_size > 1 or role.card != student.card
    default = OWN_CARD if alone else CARD_IN_TURNS if time_shared else SHARED_CARD
    return role.serving.gpu_memory_utilization or default


def sharers(roles: Mapping[str, Role]) -> frozenset[Part]:
    """The parts that hold the student's card and could leave it: the trainer, and what shares the card with it.

    An embedded sampler is not one, since it draws with the trainer's weights; nor is a model that a server elsewhere holds,
    that has another device or that is spread over several.
    """
    student = roles[STUDENT]
    found: set[Part] = {"trainer"}
    for role in roles.values():
        embedded = role.trained and role.backend != "vllm"
        elsewhere = role.serving.url or role.device_map or role.card != student.card
        if not (embedded or elsewhere or role.spread > 1):
            found.add(role.part)
    return frozenset(found)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")
