"""Settings that nothing reads in this run."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config
from rnow.plan.unread import find_readers, unread_settings


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student", "device": "cpu"},
        "teacher": {"path": "teacher", "device": "cpu"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config(**values)


def test_nothing_to_warn_of() -> None:
    assert unread_settings(config(), agentic=False) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"sampler": {"max_num_seqs": 7}}, "sampler.max_num_seqs has no effect"),
        ({"sampler": {"backend": "vllm", "batch_memory_gb": 1.0}}, "sampler.batch_memory_gb"),
        (
            {"sampler": {"url": "http://h:1", "enforce_eager": True, "max_num_seqs": 7}},
            "sampler.enforce_eager has no effect with a sampler at sampler.url",
        ),
        ({"teacher": {"tensor_parallel_size": 2}}, "teacher.tensor_parallel_size"),
        ({"teacher": {"url": "http://h:1", "quantization": "nf4"}}, "teacher.quantization"),
        (
            {"teacher": {"path": "self", "quantization": "nf4"}},
            "teacher.quantization, teacher.device has no effect with teacher.path: self",
        ),
    ],
)
def test_settings_that_the_backend_does_not_read(sections: dict[str, Any], words: str) -> None:
    (warning,) = unread_settings(config(**sections), agentic=False)
    assert words in warning


def test_settings_that_need_tools() -> None:
    tools = {"tool_timeout": 3.0, "max_tool_response": 100, "max_turns": 3}
    (warning,) = unread_settings(config(rollout=tools), agentic=False)
    for name in tools:
        assert f"rollout.{name}" in warning
    assert warning.endswith("without tools")
    assert unread_settings(config(rollout=tools), agentic=True) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rollout": {"max_turns": 1}}, []),
        ({"rollout": {"max_turns": 3, "termination_policy": "max_turns"}}, []),
        ({"teacher": {"backend": "vllm", "quantization": "nf4", "max_num_batched_tokens": 7}}, []),
        ({"teacher": {"url": "http://h:1", "served_model": "x", "device": "auto"}}, []),
        (
            {"teacher": {"served_model": "x", "tensor_parallel_size": 2}},
            [
                "teacher.served_model, teacher.tensor_parallel_size has no effect "
                "with teacher.backend transformers"
            ],
        ),
        (
            {"teacher": {"url": "http://h:1", "dtype": "float16", "tensor_parallel_size": 2}},
            [
                "teacher.dtype, teacher.device, teacher.tensor_parallel_size has no effect "
                "with a teacher at teacher.url"
            ],
        ),
    ],
)
def test_one_warning_for_each_section(sections: dict[str, Any], words: list[str]) -> None:
    assert unread_settings(config(**sections), agentic=False) == words


def test_readers_of_a_run_without_a_teacher() -> None:
    alone = Config(dataset_type="rl", model={"path": "s", "device": "cpu"})
    own = {"every run", "answers", "embedded sampler", "kl clamp", "importance ratio", "surrogate"}
    assert find_readers(alone, agentic=False) == own
    assert find_readers(alone, agentic=True) == own | {"tools", "several turns"}


def test_each_teacher_has_a_warning_of_its_own() -> None:
    teachers = {
        "here": {"path": "a", "device": "cpu", "tensor_parallel_size": 2},
        "there": {"path": "b", "url": "http://h:1", "dtype": "float16", "served_model": "x"},
    }
    found = unread_settings(config(teachers=teachers), agentic=False)
    assert found == [
        "teachers.here.tensor_parallel_size has no effect with teachers.here.backend transformers",
        "teachers.there.dtype has no effect with a teacher at teachers.there.url",
    ]
    assert find_readers(config(teachers=teachers), agentic=False) == {
        "every run", "answers", "embedded sampler", "local teacher", "vllm teacher",
        "top k", "kl clamp", "importance ratio",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "unread"),
    [
        ({}, "teacher_top_k kl_clamp clip_ratio_low ratio_cap"),
        ({"kl_estimator": "topk"}, "clip_ratio_low"),
        ({"kl_estimator": "sampled"}, "teacher_top_k"),
        ({"reward_coef": 1.0}, "teacher_top_k kl_clamp"),
        ({"kl_baseline": "optimal"}, "teacher_top_k"),
    ],
)
def test_settings_of_another_objective(algorithm: dict[str, Any], unread: str) -> None:
    given = {"teacher_top_k": 3, "kl_clamp": 1.0, "clip_ratio_low": 0.1, "ratio_cap": 3.0}
    (warning,) = unread_settings(config(algorithm=given | algorithm), agentic=False)
    names, _, why = warning.partition(" has no effect ")
    assert names == ", ".join(f"algorithm.{name}" for name in unread.split())
    assert why.startswith("with kl_estimator ")


@pytest.mark.parametrize(
    ("algorithm", "unread"),
    [
        ({}, "gae_lambda value_learning_rate"),
        ({"reward_coef": 1.0}, ""),
        ({"reward_coef": 1.0, "adv_estimator": "reinforce"}, "gae_lambda value_learning_rate"),
    ],
)
def test_settings_of_a_value_head_that_there_is_not(algorithm: dict[str, Any], unread: str) -> None:
    given = {"adv_estimator": "gae", "gae_lambda": 0.5, "value_learning_rate": 0.1}
    found = unread_settings(config(algorithm=given | algorithm), agentic=False)
    names = [
        name for warning in found for name in warning.partition(" has no effect ")[0].split(", ")
    ]
    assert names == [f"algorithm.{name}" for name in unread.split()]


def test_a_served_teacher_lists_its_likeliest_tokens_for_the_baseline() -> None:
    served = config(
        teacher={"url": "http://h:1"}, algorithm={"kl_baseline": "optimal", "teacher_top_k": 3}
    )
    assert "top k" in find_readers(served, agentic=False)
