"""The vLLMs that a run starts: what is refused, and the cards that each gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plan.test_roles import config_of
from tests.serving.test_nf4 import vllm as empty_vllm
from tests.setup.projects import Project

from rnow.errors import ConfigError, ModelError
from rnow.plan.engines import cards_of, check_engines
from rnow.plan.prepare import prepare
from rnow.plan.roles import roles_of
from rnow.serving.server import card_environment

vllm = empty_vllm
ENGINES: dict[str, Any] = {"sampler": {"backend": "vllm"}, "teacher": {"backend": "vllm"}}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[int, ...]]]:
    """``cards(count, **sections)``: the cards of each role of a run on a machine with so many."""

    def find(count: int, **sections: Any) -> dict[str, tuple[int, ...]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        merged = {
            name: ENGINES.get(name, {}) | sections.get(name, {}) for name in (*ENGINES, *sections)
        }
        return cards_of(roles_of(config_of(**merged)))

    return find


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {"student": (0,), "teacher": (0,)}),
        ({"model": {"device": "cuda:1"}}, {"student": (1,), "teacher": (0,)}),
        ({"teacher": {"device": "cuda:3"}}, {"student": (0,), "teacher": (3,)}),
        ({"sampler": {"tensor_parallel_size": 2}}, {"student": (1, 2), "teacher": (0,)}),
        (
            {"sampler": {"tensor_parallel_size": 2}, "teacher": {"device": "cuda:1"}},
            {"student": (2, 3), "teacher": (1,)},
        ),
        (
            {"model": {"device": "cuda:2"}, "teacher": {"tensor_parallel_size": 3}},
            {"student": (2,), "teacher": (0, 1, 3)},
        ),
        (
            {"teacher": {"backend": "transformers", "device_map": "auto"}},
            {"student": (0,), "teacher": (1, 2, 3)},
        ),
        ({"sampler": {"backend": "vllm", "url": "http://h:1"}}, {"teacher": (0,)}),
    ],
)
def test_each_gets_the_cards_its_section_names(
    cards: Callable[..., Any], sections: dict[str, Any], expected: dict[str, tuple[int, ...]]
) -> None:
    assert cards(4, **sections) == expected


def test_a_device_map_on_one_card_is_that_card(cards: Callable[..., Any]) -> None:
    spread = {"backend": "transformers", "device_map": "auto"}
    assert cards(1, teacher=spread)["teacher"] == (0,)


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"sampler": {"tensor_parallel_size": 2}}, "sampler.tensor_parallel_size"),
        ({"teacher": {"tensor_parallel_size": 4}}, "teacher.tensor_parallel_size"),
        (
            {
                "model": {"device": "cuda:0"},
                "sampler": {"tensor_parallel_size": 1},
                "teacher": {"tensor_parallel_size": 2},
            },
            "teacher.tensor_parallel_size",
        ),
    ],
)
def test_too_few_cards_are_refused(
    cards: Callable[..., Any], sections: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError, match="used by nothing else") as caught:
        cards(2, **sections)
    assert caught.value.where == where


def test_a_device_map_without_a_card_left_is_refused(cards: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="device_map") as caught:
        cards(
            3,
            sampler={"tensor_parallel_size": 2},
            teacher={"backend": "transformers", "device_map": "auto"},
        )
    assert caught.value.where == "teacher.device_map"


def test_cards_are_named_through_the_variable_that_was_inherited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert card_environment(()) == {}
    assert card_environment((1,)) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8f1c, 6")
    assert card_environment((1, 2)) == {"CUDA_VISIBLE_DEVICES": "GPU-8f1c,6"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_stay_with_the_trainer(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "expandable_segments:True,max_split_size_mb:64")
    assert card_environment((0,))[name] == "max_split_size_mb:64"
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert name not in card_environment((0,))


def test_an_adapter_in_float32_is_refused_on_a_gpu(
    vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, dtypes, where in (
        ("cuda", {"model": {"dtype": "float32", "quantization": "none"}}, "model.dtype"),
        ("cuda", {"sampler": {"dtype": "float32", "quantization": "none"}}, "sampler.dtype"),
        ("cpu", {"model": {"dtype": "float32"}}, None),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        sections = {name: dict(section) for name, section in dtypes.items()}
        sections["model"] = {"device": device} | sections.get("model", {})
        sections["sampler"] = {"backend": "vllm"} | sections.get("sampler", {})
        roles = roles_of(config_of(**sections, teacher={"device": "cpu"}))
        if where is None:
            check_engines(roles)
            continue
        with pytest.raises(ConfigError, match="float32 on a GPU") as caught:
            check_engines(roles)
        assert caught.value.where == where


@pytest.mark.parametrize("section", ["sampler", "teacher"])
def test_a_check_asks_for_vllm(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], section: str
) -> None:
    project = Project(tmp_path / "project", tiny_model_dir, rewards=False)
    with pytest.raises(ModelError, match="not installed") as caught:
        prepare(project.config(**{section: {"backend": "vllm"}}), project.folder, weights=False)
    assert caught.value.where == f"{section}.backend"
