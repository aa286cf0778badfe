"""Values of the config in the name of a run."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config, fill_name
from rnow.errors import ConfigError


def config(name: str, **sections: Any) -> Config:
    model = {"path": "Qwen/Qwen3-8B", "name": name}
    return Config(dataset_type="distill", model=model, teacher={"path": "t"}, **sections)


@pytest.mark.parametrize(
    ("name", "filled"),
    [
        ("plain", "plain"),
        ("lr-{trainer.learning_rate}", "lr-2e-5"),
        ("{seed}-{trainer.learning_rate}-{algorithm.loss_fn}", "7-2e-5-ppo"),
        ("{model.path}", "Qwen/Qwen3-8B"),
        ("{trainer.max_steps}", "not set"),
        ("{data.shuffle}", "true"),
        ("half { open", "half { open"),
    ],
)
def test_a_key_in_braces_is_its_value(name: str, filled: str) -> None:
    made = config(name, seed=7, trainer={"learning_rate": 2e-5})
    assert fill_name(name, made) == filled
    assert made.model.name == name, "the config keeps what was written"


def test_a_list_of_one_student_has_its_path() -> None:
    made = Config(dataset_type="rl", model={"path": ["Qwen/Qwen3-8B"], "name": "{model.path}"})
    assert fill_name("{model.path}", made) == "Qwen/Qwen3-8B"


def test_a_key_of_a_section_that_is_not_there_is_not_set() -> None:
    made = Config(dataset_type="rl", model={"path": "s", "name": "x-{teacher.path}"})
    assert fill_name("x-{teacher.path}", made) == "x-not set"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{trainer.learnig_rate}", "did you mean trainer.learning_rate?"),
        ("{lr}", "did you mean trainer.learning_rate?"),
        ("{trainer}", "{trainer} is not a key"),
        ("{}", "{} is not a key"),
        ("{trainer..x}", "is not a key"),
        ("{data.train_file}", "{data.train_file} is a list"),
        ("{rollout.mcp_url}", "is a list"),
        ("a-{model.name}", "the name itself"),
    ],
)
def test_what_is_no_key_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(name)
    assert words in caught.value.render()
    assert "model.name" in caught.value.render()
