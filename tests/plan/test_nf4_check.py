"""``rnow check`` says what 4-bit weights on vLLM need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.serving.test_nf4 import install_plugin
from tests.serving.test_nf4 import vllm as empty_vllm
from tests.setup.projects import Project

from rnow.errors import ModelError
from rnow.plan.prepare import prepare
from rnow.serving.nf4 import PLUGIN

vllm = empty_vllm

STUDENT = {
    "sampler": {"backend": "vllm"},
    "model": {"quantization": "nf4", "dtype": "bfloat16"},
}
TEACHER = {"teacher": {"backend": "vllm", "quantization": "nf4", "dtype": "bfloat16"}}


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Project:
    return Project(tmp_path / "project", tiny_model_dir, rewards=False)


@pytest.mark.parametrize(
    ("sections", "where"),
    [(STUDENT, "sampler.quantization"), (TEACHER, "teacher.quantization")],
    ids=["student", "teacher"],
)
def test_the_plugin_is_asked_for(
    vllm: Path,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    where: str,
) -> None:
    config = project.config(**sections)
    with pytest.raises(ModelError, match="nf4") as caught:
        prepare(config, project.folder, weights=False)
    assert caught.value.where == where
    assert PLUGIN in (caught.value.fix or "")
    install_plugin(monkeypatch)
    prepare(config, project.folder, weights=False)


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"backend": "vllm", "url": "http://127.0.0.1:1"}, "model": STUDENT["model"]},
        {"sampler": {"backend": "vllm", "quantization": "none"}, "model": STUDENT["model"]},
        {"sampler": {"backend": "transformers"}, "model": STUDENT["model"]},
        {"teacher": {"quantization": "nf4"}},
    ],
    ids=["served", "not quantised there", "embedded student", "embedded teacher"],
)
def test_not_where_vllm_of_ours_loads_no_4_bits(
    vllm: Path, project: Project, sections: dict[str, Any]
) -> None:
    prepare(project.config(**sections), project.folder, weights=False)
