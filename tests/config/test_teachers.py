"""The teachers that a config names: which there are, who judges what, and names that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rnow.config import Config, load_config, to_dict
from rnow.config.output import split_by_default
from rnow.config.teachers import find_teachers, key_variable
from rnow.errors import ConfigError, RnowError


def config_of(**values: Any) -> Config:
    return Config(**({"dataset_type": "distill", "model": {"path": "student"}} | values))


def files(*teachers: Any) -> dict[str, Any]:
    return {
        "train_file": [
            {"path": f"{index}.jsonl"} | ({} if teacher is None else {"teacher": teacher})
            for index, teacher in enumerate(teachers)
        ]
    }


def paths_of(config: Config) -> dict[str, str]:
    return {role: section.path for role, (_, section) in find_teachers(config).sections.items()}


def test_one_teacher_for_all() -> None:
    found = find_teachers(config_of(teacher={"path": "t"}, data=files(None, None)))
    assert list(found.sections) == ["teacher"]
    assert found.of_dataset == {"dataset_0": "teacher", "dataset_1": "teacher"}
    assert found.named == {}


def test_who_judges_the_rows_of_a_dataset() -> None:
    config = config_of(
        teacher={"path": "t"},
        teachers={"math": "m", "code": {"path": "c", "dtype": "float32"}},
        data=files("math", "org/model", {"path": "own"}, None),
    )
    assert paths_of(config) == {
        "teacher": "t", "teacher/math": "m", "teacher/code": "c", "teacher/dataset_1": "org/model",
        "teacher/dataset_2": "own",
    }  # fmt: skip
    found = find_teachers(config)
    assert list(found.of_dataset.values()) == [
        "teacher/math", "teacher/dataset_1", "teacher/dataset_2", "teacher",
    ]  # fmt: skip
    assert found.named == {"math": "teacher/math", "code": "teacher/code"}
    assert found.sections["teacher/dataset_2"][0] == ("data", "train_file", 2, "teacher")
    assert find_teachers(config_of(teachers={"a": "m"}, data=files(None))).of_dataset == {
        "dataset_0": None
    }, "its rows have to say"


def test_equal_teachers_are_one() -> None:
    config = config_of(
        teachers={"a": "m", "b": {"path": "m"}, "c": {"path": "m", "dtype": "float32"}},
        data=files({"path": "m"}, "./x", "./x"),
    )
    assert list(paths_of(config)) == ["teacher/a", "teacher/c", "teacher/dataset_1"]
    found = find_teachers(config)
    assert found.named["b"] == "teacher/a"
    assert list(found.of_dataset.values()) == ["teacher/a", *["teacher/dataset_1"] * 2]


def test_a_config_with_teachers_survives_a_round_trip() -> None:
    config = config_of(teachers={"a": "m"}, data=files("a", {"path": "x", "device": "cpu"}))
    assert Config(**to_dict(config)) == config
    assert to_dict(config)["data"]["train_file"][0]["teacher"] == "a"  # type: ignore[index,call-overload]
    changed, _ = split_by_default(config)
    assert list(changed["teachers"]) == ["a"]  # type: ignore[call-overload]
    alone = config_of(teacher={"path": "t"})
    assert "teachers" not in to_dict(alone), "the hash of a run with one teacher is what it was"


@pytest.mark.parametrize(
    ("values", "where", "said", "fix"),
    [
        ({"teachers": {"math": "m"}, "data": files("mth")}, "data.train_file[0].teacher", "no teacher is named mth (did you mean math?)", "./mth"),
        ({"teachers": {"a.b": "m"}}, "teachers.a.b", '"a.b" is no name', "letters, digits"),
        ({"teachers": {"teacher": "m"}}, "teachers.teacher", "that is the section teacher", "another name"),
        ({"teachers": {"dataset_0": "m"}, "data": files("./x")}, "data.train_file[0].teacher", "the name of another in teachers", "another name"),
        ({"teachers": {"a": "m", "b": "n"}, "data": {"train_file": [{"path": "x", "name": "teacher/a"}]}}, "data.train_file[0].name", "teacher_kl/teacher/a is another metric", "another name"),
        ({"teachers": {"a": {"path": "m", "agentic": True}, "b": {"path": "n", "agentic": False}}}, "teachers.b.agentic", "says the opposite", "once"),
        ({"teachers": {"a": {"path": "m", "quantization": "fp8"}}}, "teachers.a.quantization", "transformers does not quantise to fp8", "teachers.a.backend: vllm"),
        *[
            ({"teachers": {"a": {"path": "m", "residency": "streamed", name: value}}}, f"teachers.a.{name}", said, "residency: resident")
            for name, value, said in (
                ("quantization", "nf4", "its weights are read as they are stored"),
                ("device_map", "auto", "a spread teacher stays where it is"),
                ("backend", "vllm", "vLLM loads the whole of it"),
                ("url", "http://127.0.0.1:1", "a server holds the teacher"),
                ("trust_remote_code", True, "code of its own"),
                ("path", "self", "the trainer holds its own base anyway"),
            )
        ],
        ({"teachers": {"a": {"path": "m", "residency": "streamed"}}, "evaluation": {"teacher": True}}, "evaluation.teacher", "writes no answers", "teacher: auto"),
        ({"dataset_type": "rl", "teachers": {"a": "m"}}, "teachers.a", "only used with dataset_type distill", "remove"),
        ({"dataset_type": "rl", "data": files("./x")}, "data.train_file[0].teacher", "only used with dataset_type distill", "remove"),
        ({}, "teacher.path", "distill needs a teacher", "add a teacher"),
        ({"teachers": {"a": {"path": "m", "backend": "vllm"}}, "algorithm": {"kl_estimator": "exact"}}, "algorithm.kl_estimator", "a server gives log-probabilities only", "topk"),
        ({"teachers": {"a": {"path": "m", "max_num_batched_tokens": 2**64}}}, "teachers.a.max_num_batched_tokens", "more than 64 bits", "smaller"),
        ({"teachers": {"a": {"path": "m", "gpu_memory_utilization": 1e-40}}}, "teachers.a.gpu_memory_utilization", "too close to 0", "at least"),
    ],
)  # fmt: skip
def test_what_is_refused(values: dict[str, Any], where: str, said: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**values)
    assert caught.value.where == where
    assert said in caught.value.message
    assert fix in str(caught.value.fix)


HEAD = "dataset_type: distill\nmodel:\n  path: s\n"


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("teachers:\n  math:\n", "5:3 (teachers.math)", "expected a section"),
        ("teachers: [a]\n", "4:1 (teachers)", "expected a section of names"),
        ("teachers:\n  math: {path: m, device: 4}\n", "5:19 (teachers.math.device)", "expected text"),
        ("data:\n  train_file: [{path: a, teacher: 3}]\n", "5:26 (data.train_file[0].teacher)", "a path, or a section with path"),
        ("data:\n  train_file: [{path: a, teacher: ''}]\n", "5:26 (data.train_file[0].teacher)", "must not be empty"),
    ],
)  # fmt: skip
def test_faults_have_their_place(tmp_path: Path, text: str, where: str, said: str) -> None:
    (tmp_path / "config.yml").write_text(HEAD + text)
    with pytest.raises(RnowError) as caught:
        load_config(tmp_path)
    assert str(caught.value.where).endswith(where)
    assert said in caught.value.message


@pytest.mark.parametrize("text", ["teachers:\n  math: {path: x, pat: m}\n", "data:\n  train_file: [{path: a, teacher: {path: x, pat: m}}]\n"])  # fmt: skip
def test_an_unknown_key_of_a_teacher_comes_with_a_suggestion(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yml").write_text(HEAD + text)
    with pytest.raises(ConfigError, match='unknown key "pat"') as caught:
        load_config(tmp_path)
    assert caught.value.fix == "did you mean path?"


def test_an_override_of_one_teacher(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(HEAD + "teachers:\n  math: {path: m}\n")
    loaded = load_config(tmp_path, ["teachers.math.path=2024", "teachers.math.dtype=float32"])
    assert loaded.config.teachers["math"].path == "2024", "text needs no quotes"
    assert "teachers.math.dtype: auto (default) -> float32" in loaded.changes


def test_a_server_may_have_a_key_of_its_own() -> None:
    assert key_variable("teacher") == "RNOW_TEACHER_API_KEY"
    assert key_variable("teacher/my-math") == "RNOW_TEACHER_MY_MATH_API_KEY"
