"""Who reads the settings of a run, and which settings nothing reads."""

from __future__ import annotations

from rnow.config import Config
from rnow.config.keys import Reader
from rnow.config.reserved import value_at
from rnow.config.schema import KEYS, field_at
from rnow.plan.choices import kl_estimator, reads_hidden_states, sampler_backend, teacher_backend


def find_readers(config: Config, *, agentic: bool) -> frozenset[Reader]:
    """The readers that this run has: its backends decide, and whether there are tools."""
    found: set[Reader] = {"every run"}
    rollout, teacher = config.rollout, config.teacher
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
    if teacher is not None:
        if teacher.url is None:
            found.add("local teacher")
        if teacher_backend(teacher) == "vllm":
            found.add("vllm teacher")
            if teacher.url is None:
                found.add("local vllm teacher")
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
    return found


def unread_settings(config: Config, *, agentic: bool) -> list[str]:
    """One warning for each section with settings that nothing reads: the chosen backend does not, or there are no tools."""
    backend = f"with sampler.backend {sampler_backend(config)}"
    given = "with a sampler at sampler.url"
    objective = f"with kl_estimator {kl_estimator(config)}"
    if config.algorithm.reward_coef == 0:
        objective += " and reward_coef 0"
    why = {"rollout": "without tools", "sampler": given if config.sampler.url else backend}
    why["algorithm"] = objective
    if config.teacher is not None:
        backend = f"with teacher.backend {teacher_backend(config.teacher)}"
        why["teacher"] = "with a teacher at teacher.url" if config.teacher.url else backend
    readers = find_readers(config, agentic=agentic)
    lines = []
    for section, reason in why.items():
        names = [
            key
            for key, said in KEYS.items()
            if key.startswith(f"{section}.") and said.reader not in readers and _is_set(config, key)
        ]
        if names:
            lines.append(f"{', '.join(names)} has no effect {reason}")
    return lines


def _is_set(config: Config, key: str) -> bool:
    """Whether a key is not at its default."""
    field = field_at(tuple(key.split(".")))
    assert field is not None, key
    return value_at(config, key) != field.default
