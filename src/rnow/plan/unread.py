"""Who reads the settings of a run, and which settings nothing reads."""

from __future__ import annotations

from collections.abc import Collection

from rnow.config import Config, TeacherSection
from rnow.config.estimator import has_value_head, kl_estimator
from rnow.config.keys import Reader
from rnow.config.problems import dotted
from rnow.config.schema import KEYS, Section
from rnow.config.teachers import TEACHER, teacher_sections
from rnow.plan.choices import reads_hidden_states, sampler_backend, teacher_backend


def find_readers(config: Config, *, agentic: bool) -> frozenset[Reader]:
    """The readers that this run has: its type and its backends decide, and whether there are tools."""
    found: set[Reader] = {"every run"}
    if not config.on_policy:
        return frozenset(found)
    found.add("answers")
    rollout = config.rollout
    if agentic:
        found |= {"tools", "several turns"}
    elif rollout.termination_policy == "max_turns" or rollout.max_turns == 1:
        found.add("several turns")
    if sampler_backend(config) == "transformers":
        found.add("embedded sampler")
    else:
        found.add("vllm sampler")
        if config.sampler.url is None:
            found.add("local vllm sampler")
    for _, section in teacher_sections(config):
        found |= _readers_of(section)
    return frozenset(found | _objective_readers(config))


def _objective_readers(config: Config) -> set[Reader]:
    algorithm, estimator = config.algorithm, kl_estimator(config)
    found: set[Reader] = set()
    if estimator == "topk" or (algorithm.kl_baseline != "none" and not reads_hidden_states(config)):
        found.add("top k")
    if estimator in ("sampled", "topk"):
        found |= {"kl clamp", "importance ratio"}
    if estimator == "sampled" or algorithm.reward_coef > 0:
        found |= {"importance ratio", "surrogate"}
    if has_value_head(config):
        found.add("value head")
    return found


def _readers_of(teacher: TeacherSection) -> set[Reader]:
    found: set[Reader] = {"every run", "answers"}
    if teacher.url is None and not teacher.own_base:
        found.add("local teacher")
    if teacher_backend(teacher) == "vllm":
        found |= {"vllm teacher"} if teacher.url else {"vllm teacher", "local vllm teacher"}
    return found


def unread_settings(config: Config, *, agentic: bool) -> list[str]:
    """One warning for each section with settings that nothing reads: the chosen backend does not, there are no tools, or the
    student gives no answers."""
    if not config.on_policy:
        return _unread_by_rows(config)
    backend = f"with sampler.backend {sampler_backend(config)}"
    given = "with a sampler at sampler.url"
    algorithm = config.algorithm
    objective = f"with kl_estimator {kl_estimator(config)}, "
    objective += (
        "reward_coef 0"
        if algorithm.reward_coef == 0
        else f"adv_estimator {algorithm.adv_estimator}"
    )
    why = {"rollout": "without tools", "sampler": given if config.sampler.url else backend}
    why["algorithm"] = objective
    readers = find_readers(config, agentic=agentic)
    found = [(_unread(name, getattr(config, name), readers, name), why[name]) for name in why]
    for path, section in teacher_sections(config):
        name = dotted(path)
        backend = f"with {name}.backend {teacher_backend(section)}"
        reason = f"with a teacher at {name}.url" if section.url else backend
        reason = f"with {name}.path: self" if section.own_base else reason
        found.append((_unread(TEACHER, section, _readers_of(section), name), reason))
    return [f"{', '.join(names)} has no effect {reason}" for names, reason in found if names]


def _unread_by_rows(config: Config) -> list[str]:
    sections = ("data", "algorithm", "rollout", "sampler", "evaluation")
    readers = find_readers(config, agentic=False)
    found = [_unread(name, getattr(config, name), readers, name) for name in sections]
    reason = f"with dataset_type {config.dataset_type}, in which nothing is sampled"
    return [f"{', '.join(names)} has no effect {reason}" for names in found if names]


def _unread(kind: str, section: Section, readers: Collection[Reader], shown: str) -> list[str]:
    """The keys of a section that are not at their default and that nobody reads, as keys of ``shown``."""
    return [
        f"{shown}.{name}"
        for name, field in type(section).model_fields.items()
        if KEYS[f"{kind}.{name}"].reader not in readers and getattr(section, name) != field.default
    ]
