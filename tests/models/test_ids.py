from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rnow.errors import ModelError
from rnow.models.ids import check_model_id, role_of, suggest_id

API_ONLY = [
    "openai/gpt-4o",
    "openai/o3-mini",
    "anthropic/claude-sonnet-4",
    "google/gemini-2.5-pro",
    "gpt-4o",
    "gpt-3.5-turbo",
    "o3-mini",
    "claude-3-5-sonnet",
    "gemini-2.0-flash",
    "x-ai/grok-4",
    "qwen/qwen-max",
    "deepseek/deepseek-chat",
]
WRONG_CASE = {
    "qwen/qwen3-32b": "Qwen/Qwen3-32B",
    "QWEN/Qwen3-8B": "Qwen/Qwen3-8B",
    "qwen/qwen-2.5-72b-instruct": "Qwen/Qwen2.5-72B-Instruct",
    "qwen/qwen3-30b-a3b:free": "Qwen/Qwen3-30B-A3B",
    "qwen/qwq-32b": "Qwen/QwQ-32B",
    "deepseek/deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek/deepseek-v3.1": "deepseek-ai/DeepSeek-V3.1",
    "meta-llama/llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral/mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "z-ai/glm-4.5-air": "zai-org/GLM-4.5-Air",
}
ACCEPTED = [
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-2-7b-hf",
    "google/gemma-3-4b-it",
    "openai/gpt-oss-20b",
    "microsoft/phi-4",
    "mistralai/Mistral-7B-v0.1",
    "nvidia/anything",
    "openai-community/gpt2",
    "gpt2",
    "EleutherAI/gpt-j-6b",
    "deepseek-ai/deepseek-coder-6.7b-instruct",
    "somebody/a-model-nobody-heard-of",
    "./qwen/qwen3-32b",
    "/models/gpt-4o",
]


@pytest.mark.parametrize("path", API_ONLY)
def test_api_models_are_refused_for_both_roles(path: str) -> None:
    for key, title in (
        ("teacher.path", "Unsupported teacher model"),
        ("model.path", "Unsupported student model"),
    ):
        with pytest.raises(ModelError) as caught:
            check_model_id(path, key=key)
        assert caught.value.title == title
        assert "API" in caught.value.render()
    assert "log-probabilities" not in caught.value.render()  # the student's reason is another


@pytest.mark.parametrize(("path", "right"), WRONG_CASE.items())
def test_wrong_spellings_get_the_right_one(path: str, right: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_model_id(path, key="teacher.path")
    assert f"did you mean '{right}'?" in caught.value.message
    assert caught.value.fix is not None
    assert f"teacher.path: {right}" in caught.value.fix
    check_model_id(right, key="teacher.path")


@pytest.mark.parametrize("path", ACCEPTED)
def test_anything_else_passes(path: str) -> None:
    check_model_id(path, key="teacher.path")
    assert suggest_id(path) in (None, path)


def test_an_existing_folder_passes_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "qwen" / "qwen3-32b").mkdir(parents=True)
    (tmp_path / "gpt-4o").mkdir()
    check_model_id("qwen/qwen3-32b", key="teacher.path", base_dir=tmp_path)
    check_model_id("gpt-4o", key="model.path", base_dir=tmp_path)
    with pytest.raises(ModelError):
        check_model_id("gpt-4o", key="model.path", base_dir=tmp_path / "qwen")


def test_the_role_comes_from_the_key() -> None:
    assert role_of("teacher.path") == role_of("data.train_file[1].teacher") == "teacher"
    assert role_of("model.path") == "student"


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("teacher_gpt_4o", "openai/gpt-4o", "teacher.path"),
        ("teacher_claude", "anthropic/claude-sonnet-4", "teacher.path"),
        ("teacher_gemini", "google/gemini-2.5-pro", "teacher.path"),
        ("teacher_wrong_case", "qwen/qwen3-32b", "teacher.path"),
        ("student_gpt_4o", "gpt-4o", "model.path"),
        ("student_wrong_case", "qwen/qwen3-8b", "model.path"),
    ],
)
def test_reports(check_golden: Callable[..., None], name: str, path: str, key: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_model_id(path, key=key)
    assert caught.value.where == key
    caught.value.where = f"config.yml:12 ({key})"  # whoever read the config knows the line
    check_golden(name, caught.value)


def test_the_id_of_a_hosted_run_is_named_as_such() -> None:
    with pytest.raises(ModelError, match="id of a hosted run") as caught:
        check_model_id("3f2b8c1e-9d47-4a6b-8e21-0c5d7f9ab312", key="model.path")
    assert caught.value.where == "model.path"
