"""Settings that exclude each other."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config
from rnow.errors import ConfigError
from rnow.plan.prepare import prepare


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student", "device": "cpu"},
        "teacher": {"path": "teacher", "device": "cpu"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config(**values)


@pytest.mark.parametrize("section", ["sampler", "teacher"])
def test_a_url_is_a_vllm_server(tmp_path: Any, section: str) -> None:
    wrong = config(**{section: {"url": "http://h:1", "backend": "transformers"}})
    with pytest.raises(ConfigError, match=f"{section}.url names a vLLM server"):
        prepare(wrong, tmp_path, weights=False)


def test_a_served_teacher_is_not_tempered(tmp_path: Any) -> None:
    wrong = config(teacher={"url": "http://h:1"}, rollout={"temperature": 0.7})
    with pytest.raises(ConfigError, match=r"temperature 0\.7"):
        prepare(wrong, tmp_path, weights=False)
