"""Rules that hold between keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel

from rnow.config.estimator import kl_estimator
from rnow.config.names import name_problems
from rnow.config.problems import KeyPath, Problem, dotted
from rnow.config.teachers import (
    TEACHER,
    any_crossed,
    any_served,
    control_of,
    find_teachers,
    own_teachers,
    teacher_sections,
)
from rnow.text.suggest import hint

if TYPE_CHECKING:
    from rnow.config.schema import Schema

MAX_COUNT = 2**63
SMALLEST, LARGEST = 1e-30, 1e30
"""Sizes of numbers that leave float32 room to compute: it holds 1e-38 to 3e38."""
RESERVED_DATASETS = frozenset({"k3"})
TEACHER_NAME = re.compile(r"[A-Za-z0-9_-]+")
RESERVED_EVALS = frozenset({"before", "after", "teacher"})


def find_contradictions(config: Schema) -> Iterator[Problem]:
    """Every pair of settings that cannot go together."""
    yield from name_problems(config)
    yield from _out_of_range(config, ())
    yield from _without_its_teacher(config)
    yield from _elsewhere_and_own(config)
    yield from _without_placeholder(config)
    yield from _teacher_names(config)
    yield from _of_two_minds(config)
    yield from _unknown_to_its_engine(config)
    yield from _streamed_elsewhere(config)
    yield from _across_tokenizers(config)
    if config.on_policy:
        yield from _without_signal(config)
        yield from _dropping(config)
        yield from _unknown_to_its_estimator(config)
        yield from _uncontrolled(config)
        yield from _truncated(config)
    yield from _names_taken(config)


def _without_its_teacher(config: Schema) -> Iterator[Problem]:
    distill, sections = config.dataset_type == "distill", [*teacher_sections(config)]
    if distill and not sections:
        yield Problem(
            path=("teacher", "path"),
            message="dataset_type distill needs a teacher",
            hint="add a teacher section with path: <HuggingFace id or local folder>",
        )
    if not distill and sections:
        path, _ = sections[0]
        yield Problem(
            path=path,
            message=f"a teacher is only used with dataset_type distill, not {config.dataset_type}",
            hint="remove the teacher section, or set dataset_type: distill"
            + ("; sft learns the answers that are in the rows" * (config.dataset_type == "sft")),
        )


def _elsewhere_and_own(config: Schema) -> Iterator[Problem]:
    """The student's own base as the teacher, and a place where another model is."""
    for path, teacher in teacher_sections(config):
        given = {
            "url": teacher.url is not None,
            "backend": teacher.backend == "vllm",
            "revision": teacher.revision is not None,
        }
        for name in (name for name, asked in given.items() if asked and teacher.own_base):
            yield Problem(
                path=(*path, name),
                message=f"{name} cannot go with path: self, the base that the trainer holds anyway",
                hint="remove it, or name the teacher's model with path (a folder called self is ./self)",
            )


def _without_placeholder(config: Schema) -> Iterator[Problem]:
    """A template of a teacher that would not see the question, or what the row tells it."""
    unseen = {"{prompt}": "the question", "{context}": "the row's privileged_context"}
    for path, teacher in teacher_sections(config):
        for name in (name for name in unseen if name not in teacher.template):
            yield Problem(
                path=(*path, "template"),
                message=f"the template has no {name}, so the teacher would not see {unseen[name]}",
                hint=f"write {name} where it belongs; for a prompt of another kind give rows teacher_messages",
            )


def _teacher_names(config: Schema) -> Iterator[Problem]:
    """Names of teachers that mean nothing, or more than one thing."""
    for name in config.teachers:
        path = ("teachers", name)
        if not TEACHER_NAME.fullmatch(name):
            message = f'"{name}" is no name for a teacher'
            yield Problem(path=path, message=message, hint="use letters, digits, _ and -")
        elif name == TEACHER:
            message = f"no other teacher can be named {name}: that is the section {name}"
            yield Problem(path=path, message=message, hint="choose another name")
    own = dict(own_teachers(config))
    for index, source in enumerate(config.data.sources):
        path, asked = ("data", "train_file", index, "teacher"), source.teacher
        if index not in own:
            continue
        beside = config.teachers and not own[index].own_base
        if beside and isinstance(asked, str) and "/" not in asked:
            yield Problem(
                path=path,
                message=f"no teacher is named {asked}{hint(asked, config.teachers)}",
                hint=f"teachers has {', '.join(config.teachers)}; a model is written with a slash (./{asked}), or as a "
                "section with path",
            )
        elif source.name in config.teachers:
            yield Problem(
                path=path,
                message=f"the teacher of the dataset {source.name} would have the name of another in teachers",
                hint="give the dataset or that teacher another name",
            )


def _of_two_minds(config: Schema) -> Iterator[Problem]:
    """``agentic`` and ``control`` are of the whole run."""
    for key, why in (
        ("agentic", "says the opposite, and a run has tools or has none"),
        ("control", "names another control, and a run is one or the other"),
    ):
        given = [(path, getattr(section, key)) for path, section in teacher_sections(config)]
        said = [(path, value) for path, value in given if value is not None]
        for path, value in said[1:]:
            if value != said[0][1]:
                yield Problem(
                    path=(*path, key), message=f"another teacher {why}", hint="say it once"
                )


def _unknown_to_its_engine(config: Schema) -> Iterator[Problem]:
    """A teacher stored as its engine cannot load it."""
    for path, teacher in teacher_sections(config):
        if teacher.url is not None:
            continue
        # auto loads the teacher with transformers where no url is given.
        engine = "vllm" if teacher.backend == "vllm" else "transformers"
        if teacher.quantization == ("int8" if engine == "vllm" else "fp8"):
            other = "transformers" if engine == "vllm" else "vllm"
            yield Problem(
                path=(*path, "quantization"),
                message=f"{engine} does not quantise to {teacher.quantization} while it loads",
                hint=f"set {dotted(path)}.backend: {other}, or {dotted(path)}.quantization: nf4",
            )


def _streamed_elsewhere(config: Schema) -> Iterator[Problem]:
    """Layers that are to be streamed from files, of a teacher that is held otherwise or has to write answers."""
    for path, teacher in teacher_sections(config):
        if teacher.residency != "streamed":
            continue
        beside = {
            "url": (teacher.url is not None, "a server holds the teacher"),
            "backend": (teacher.backend == "vllm", "vLLM loads the whole of it"),
            "path": (teacher.own_base, "the trainer holds its own base anyway"),
            "device_map": (teacher.device_map is not None, "a spread teacher stays where it is"),
            "quantization": (teacher.quantization != "none", "its weights are read as they are stored"),
            "trust_remote_code": (teacher.trust_remote_code, "code of its own may run layers as it likes"),
        }  # fmt: skip
        for name, (given, why) in beside.items():
            if given:
                yield Problem(
                    path=(*path, name),
                    message=f"{name} cannot go with residency: streamed: {why}",
                    hint=f"remove {name if name != 'path' else 'residency'}, or set residency: resident",
                )
        if config.evaluation.teacher is True:
            yield Problem(
                path=("evaluation", "teacher"),
                message=f"a teacher with {dotted(path)}.residency: streamed writes no answers: every token would read all its "
                "layers",
                hint="set evaluation.teacher: auto, or residency: resident",
            )


def _across_tokenizers(config: Schema) -> Iterator[Problem]:
    """What only works on tokens that student and teacher share."""
    if not any_crossed(config):
        return
    for key, section in teacher_sections(config):
        if section.tokenizer != "cross":
            yield Problem(
                path=(*key, "tokenizer"),
                message="a step cannot mix chunks of text, which a teacher with tokenizer cross judges, with the student's tokens",
                hint="set tokenizer: cross for every teacher (it does no harm where tokenizers agree), or for none",
            )
    algorithm, rollout = config.algorithm, config.rollout
    for key, holds, why, instead in (
        (
            "algorithm.kl_estimator",
            algorithm.kl_estimator in ("auto", "sampled"),
            "its distribution over tokens is one over other tokens than the student's",
            "set kl_estimator: sampled",
        ),
        (
            "algorithm.kl_baseline",
            algorithm.kl_baseline == "none",
            "its distribution over tokens is one over other tokens than the student's",
            "set kl_baseline: none",
        ),
        (
            "algorithm.kl_discount",
            algorithm.kl_discount == 0,
            "the KL of a chunk belongs to all of its tokens, and has no order within",
            "set kl_discount: 0",
        ),
        (
            "rollout.temperature",
            rollout.temperature == 1,
            "tempering token by token is another distribution of texts in other tokens",
            "set temperature: 1",
        ),
        (
            "evaluation.teacher",
            config.evaluation.teacher is not True,
            "held-out prompts are answered in the student's tokens",
            "set teacher: auto",
        ),
    ):
        if not holds:
            yield Problem(
                path=tuple(key.split(".")),
                message=f"{key.rpartition('.')[2]} cannot go with teacher.tokenizer cross: {why}",
                hint=f"{instead}, or use a teacher with the student's tokenizer",
            )


def _without_signal(config: Schema) -> Iterator[Problem]:
    """Settings under which every advantage is 0, or the rewards' part of it."""
    algorithm, data = config.algorithm, config.data
    if algorithm.kl_penalty_coef == algorithm.reward_coef == 0:
        yield Problem(
            path=("algorithm", "kl_penalty_coef"),
            message="kl_penalty_coef and reward_coef are both 0, so nothing would be learned",
            hint="set kl_penalty_coef above 0 to follow the teacher, or reward_coef above 0 to follow the rewards",
        )
    elif algorithm.reward_coef == 0 and config.dataset_type == "rl":
        yield Problem(
            path=("algorithm", "reward_coef"),
            message="reward_coef is 0, so nothing would be learned: the KL of rl is that to the student's own start",
            hint="set reward_coef above 0, or follow a teacher with dataset_type: distill",
        )
    if algorithm.adv_estimator == "gae":
        return  # judged against what the value head expects
    in_group = algorithm.adv_estimator == "grpo"
    compared = data.group_size if in_group else data.group_size * data.batch_size
    if algorithm.reward_coef > 0 and compared == 1:
        yield Problem(
            path=("data", "group_size"),
            message=f"group_size is 1: with adv_estimator {algorithm.adv_estimator} a reward is judged against "
            f"the others of its {'group' if in_group else 'batch'}, so every advantage would be 0",
            hint="set data.group_size to 2 or more"
            + (", or algorithm.adv_estimator: reinforce" if in_group else ""),
        )


def _dropping(config: Schema) -> Iterator[Problem]:
    """Groups that are to be left out although something is learned from them."""
    algorithm = config.algorithm
    if algorithm.drop_equal_groups is not True:
        return
    path = ("algorithm", "drop_equal_groups")
    if config.dataset_type != "rl":
        yield Problem(
            path=path,
            message="drop_equal_groups would leave out what the teacher says of those answers",
            hint="remove it; it is for dataset_type: rl",
        )
    elif algorithm.adv_estimator != "grpo":
        yield Problem(
            path=path,
            message=f"with adv_estimator {algorithm.adv_estimator} a group with equal rewards still says something: it is judged "
            "against the others of its batch, or against what is expected",
            hint="remove drop_equal_groups, or set adv_estimator: grpo",
        )


def _unknown_to_its_estimator(config: Schema) -> Iterator[Problem]:
    """What only another way of estimating the KL can do."""
    algorithm, served = config.algorithm, any_served(config)
    estimator, divergence = kl_estimator(config), algorithm.divergence
    if estimator == "exact" and served:
        yield Problem(
            path=("algorithm", "kl_estimator"),
            message="exact needs the teacher's hidden states and head, and a server gives log-probabilities only",
            hint="set algorithm.kl_estimator: topk, which needs the teacher's likeliest tokens, or load the teacher here "
            "(teacher.backend: transformers)",
        )
    if divergence == "jsd" and (estimator in ("sampled", "topk") or served):
        yield Problem(
            path=("algorithm", "divergence"),
            message="jsd needs the teacher's whole distribution",
            hint="set algorithm.kl_estimator: exact (with a teacher that is loaded here), or algorithm.divergence: reverse",
        )
    if divergence == "forward" and estimator == "sampled":
        yield Problem(
            path=("algorithm", "divergence"),
            message="sampled estimates KL(student, teacher) from the student's own tokens; forward needs those that the "
            "teacher would write",
            hint="set algorithm.kl_estimator: exact or topk, or algorithm.divergence: reverse",
        )
    if estimator in ("exact", "topk") and algorithm.kl_penalty_coef == 0:
        yield Problem(
            path=("algorithm", "kl_penalty_coef"),
            message=f"kl_penalty_coef is 0, so {estimator} has nothing to do",
            hint="set it above 0, or remove kl_estimator",
        )
    for key in ("kl_baseline", "kl_discount"):
        if getattr(algorithm, key) not in ("none", 0) and estimator in ("exact", "topk"):
            yield Problem(
                path=("algorithm", key),
                message=f"{key} belongs to kl_estimator: sampled; {estimator} has no sampled advantage",
                hint=f"remove {key}, or set algorithm.kl_estimator: sampled",
            )
    if algorithm.kl_horizon is not None and algorithm.reward_coef > 0:
        yield Problem(
            path=("algorithm", "kl_horizon"),
            message="kl_horizon cuts the answers that rewards would have to judge",
            hint="remove kl_horizon, or set algorithm.reward_coef: 0",
        )


def _uncontrolled(config: Schema) -> Iterator[Problem]:
    """Controls that would show nothing."""
    algorithm, control = config.algorithm, control_of(config)
    if control is None:
        return
    path = next((*key, "control") for key, s in teacher_sections(config) if s.control is not None)
    if algorithm.kl_penalty_coef == 0:
        yield Problem(
            path=path,
            message=f"control {control} stands in for the teacher, and with kl_penalty_coef 0 nothing is learned from it",
            hint="remove control, or set algorithm.kl_penalty_coef above 0",
        )
    if control == "none":
        told = f"kl_estimator {algorithm.kl_estimator}"
        if algorithm.kl_baseline == "optimal":
            told = "kl_baseline optimal"
        elif algorithm.kl_estimator in ("auto", "sampled"):
            return
        yield Problem(
            path=path,
            message=f"control none gives each sampled token one number, and {told} needs the teacher's distribution",
            hint="set algorithm.kl_estimator: sampled without kl_baseline, or teacher.control: shuffled",
        )
    elif config.data.batch_size == 1:
        yield Problem(
            path=path,
            message="control shuffled with batch_size 1 judges an answer by another one to the same prompt, which still teaches",
            hint="set data.batch_size to 2 or more",
        )


def _truncated(config: Schema) -> Iterator[Problem]:
    rollout, algorithm = config.rollout, config.algorithm
    direct = algorithm.kl_estimator in ("exact", "topk") and algorithm.reward_coef == 0
    if algorithm.loss_fn != "ppo" or direct:
        return
    for name, value, neutral in (
        ("top_p", rollout.top_p, rollout.top_p == 1),
        ("top_k", rollout.top_k, rollout.top_k <= 0),
    ):
        if not neutral:
            yield Problem(
                path=("rollout", name),
                message=f"{name} {value:g} cannot go with ppo: a token's probability is higher where it was sampled than "
                "where it is trained, which ppo takes for a policy that has moved, and clips",
                hint=f"remove {name}, or set algorithm.loss_fn: importance_sampling, which corrects for it",
            )


def _names_taken(config: Schema) -> Iterator[Problem]:
    names = [source.name for source in config.data.sources]
    several = len(find_teachers(config).sections) > 1
    for index, name in enumerate(names):
        path = ("data", "train_file", index, "name")
        if name in names[:index]:
            message = f"two datasets are named {name}"
            yield Problem(path=path, message=message, hint="give each its own name")
        elif name in RESERVED_DATASETS:
            message = f"a dataset cannot be named {name}: teacher_kl/{name} is another metric"
            yield Problem(path=path, message=message, hint="choose another name")
        elif several and (name == TEACHER or name.startswith(f"{TEACHER}/")):
            message = f"a dataset cannot be named {name} beside several teachers: teacher_kl/{name} is another metric"
            yield Problem(path=path, message=message, hint="choose another name")
    names = [entry.name or f"eval_{index}" for index, entry in enumerate(config.evals)]
    for index, name in enumerate(names):
        if name in RESERVED_EVALS or name in names[:index]:
            why = "is one of rnow's own" if name in RESERVED_EVALS else "is taken"
            yield Problem(
                path=("evals", index, "name"),
                message=f"the evaluation name {name} {why}",
                hint="choose another name",
            )


def _out_of_range(values: object, path: KeyPath) -> Iterator[Problem]:
    """Numbers that the program cannot compute with: YAML has no limit, and Python's are wider than those of counters, of
    float32, and of clocks."""
    if isinstance(values, BaseModel):
        for name in type(values).model_fields:
            yield from _out_of_range(getattr(values, name), (*path, name))
    elif isinstance(values, tuple):
        for index, item in enumerate(values):
            yield from _out_of_range(item, (*path, index))
    elif isinstance(values, Mapping):
        for name, item in values.items():
            yield from _out_of_range(item, (*path, name))
    elif isinstance(values, int) and abs(values) >= MAX_COUNT:
        yield Problem(
            path=path, message="a whole number of more than 64 bits", hint="write a smaller one"
        )
    elif isinstance(values, float) and values and not SMALLEST <= abs(values) <= LARGEST:
        large = abs(values) > LARGEST
        size, limit = ("large", LARGEST) if large else ("close to 0", SMALLEST)
        yield Problem(
            path=path,
            message=f"{values:g} is too {size} to compute with in float32",
            hint=f"write {'at most' if large else 'at least'} {limit:g}",
        )
