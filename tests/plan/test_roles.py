"""The models of a run by role."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plan.test_rendered import make_config

from rnow.config import Config
from rnow.plan.choices import sampler_backend, teacher_backend
from rnow.plan.roles import engine_share, roles_of, sharers, used_roles


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def config_of(**sections: Any) -> Config:
    """Both models on the first card, unless told otherwise."""
    cuda = {"device": "cuda"}
    sections["model"] = {"path": "student"} | cuda | sections.get("model", {})
    sections["teacher"] = {"path": "teacher"} | cuda | sections.get("teacher", {})
    return make_config(**sections)


def test_the_student_comes_first_and_alone_without_a_teacher() -> None:
    assert list(roles_of(make_config())) == ["student", "teacher"]
    alone = Config(dataset_type="rl", model={"path": "student"}, data={"train_file": "t.jsonl"})
    assert list(roles_of(alone)) == ["student"]


@pytest.mark.parametrize(
    ("sections", "backends"),
    [
        ({"model": {"device": "cpu"}}, ("transformers", "transformers")),
        ({"sampler": {"url": "http://h:1"}, "teacher": {"url": "http://h:2"}}, ("vllm", "vllm")),
        ({"sampler": {"backend": "transformers"}}, ("transformers", "transformers")),
    ],
)
def test_auto_is_decided_once(
    two_cards: None, sections: dict[str, Any], backends: tuple[str, str]
) -> None:
    config = config_of(**sections)
    assert tuple(role.backend for role in roles_of(config).values()) == backends
    assert config.teacher is not None
    assert (sampler_backend(config), teacher_backend(config.teacher)) == backends


def test_a_vllm_holds_the_base_as_the_trainer_does_unless_told_otherwise(two_cards: None) -> None:
    vllm = {"backend": "vllm"}
    student = roles_of(config_of(sampler=vllm))["student"]
    assert (student.quantization, student.serving_format) == ("nf4", ("nf4", "bfloat16"))
    plain = vllm | {"quantization": "none", "dtype": "float16"}
    assert roles_of(config_of(sampler=plain))["student"].serving_format == ("none", "float16")


@pytest.mark.parametrize(
    ("sections", "role", "time_shared", "share"),
    [
        ({}, "student", False, 0.35),
        ({}, "student", True, 0.8),
        ({}, "teacher", False, 0.35),
        ({"teacher": {"device": "cuda:1"}}, "teacher", True, 0.9),
        ({"sampler": {"tensor_parallel_size": 2}}, "student", False, 0.9),
        ({"sampler": {"gpu_memory_utilization": 0.6}}, "student", True, 0.6),
    ],
)
def test_a_share_of_the_card(
    two_cards: None, sections: dict[str, Any], role: str, time_shared: bool, share: float
) -> None:
    roles = roles_of(config_of(**sections))
    assert engine_share(roles[role], roles["student"], time_shared=time_shared) == share


def test_who_could_leave_the_card(two_cards: None) -> None:
    vllm = {"backend": "vllm"}
    assert sharers(roles_of(config_of(sampler=vllm))) == {"trainer", "sampler", "teacher"}
    other = config_of(sampler=vllm, teacher={"device": "cuda:1"})
    assert sharers(roles_of(other)) == {"trainer", "sampler"}
    embedded = config_of(sampler={"backend": "transformers"}, teacher={"url": "http://h:1"})
    assert sharers(roles_of(embedded)) == {"trainer"}


def test_every_teacher_has_a_role_and_those_that_judge_somebody_a_turn_of_their_own(
    two_cards: None,
) -> None:
    files = [{"path": "a", "teacher": "math"}, {"path": "b", "teacher": {"path": "own"}}]
    config = config_of(
        teachers={"math": {"path": "m", "url": "http://h:1"}, "spare": {"path": "s"}},
        data={"train_file": files},
    )
    roles = roles_of(config)
    assert [role.key for role in roles.values()] == [
        "model", "teacher", "teachers.math", "teachers.spare", "data.train_file[1].teacher",
    ]  # fmt: skip
    assert [role.backend for role in roles.values()] == ["transformers"] * 2 + ["vllm"] + [
        "transformers"
    ] * 2
    used = used_roles(roles, {"teacher", "teacher/math", "teacher/dataset_1"})
    assert {name: role.part for name, role in used.items()} == {
        "student": "sampler", "teacher": "teacher/teacher", "teacher/math": "teacher/math",
        "teacher/dataset_1": "teacher/dataset_1",
    }  # fmt: skip
    assert sharers(used) == {"trainer", "teacher/teacher", "teacher/dataset_1"}
    (only,) = used_roles(roles, {"teacher/spare"}).keys() - {"student"}
    assert only == "teacher/spare"
    assert used_roles(roles, {"teacher/spare"})[only].part == "teacher", "alone it needs no name"
