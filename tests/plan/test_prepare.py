"""Settings that exclude each other, and settings that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config
from rnow.errors import ConfigError
from rnow.plan.prepare import prepare, unread_settings


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
        ({"teacher": {"tensor_parallel_size": 2}}, "teacher.tensor_parallel_size"),
        ({"teacher": {"url": "http://h:1", "quantization": "nf4"}}, "teacher.quantization"),
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


@pytest.mark.parametrize("section", ["sampler", "teacher"])
def test_a_url_is_a_vllm_server(tmp_path: Any, section: str) -> None:
    wrong = config(**{section: {"url": "http://h:1", "backend": "transformers"}})
    with pytest.raises(ConfigError, match=f"{section}.url names a vLLM server"):
        prepare(wrong, tmp_path, weights=False)


def test_a_served_teacher_is_not_tempered(tmp_path: Any) -> None:
    wrong = config(teacher={"url": "http://h:1"}, rollout={"temperature": 0.7})
    with pytest.raises(ConfigError, match=r"temperature 0\.7"):
        prepare(wrong, tmp_path, weights=False)
