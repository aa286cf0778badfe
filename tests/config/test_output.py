"""A config written out reads back as itself, and its hash names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rnow.config import Config, config_hash, load_config, to_dict, to_yaml
from rnow.config.strict_yaml import parse_document

words = st.text(min_size=1, max_size=20)
numbers = st.floats(min_value=1e-9, max_value=1e9)
configs = st.fixed_dictionaries(
    {
        "dataset_type": st.just("distill"),
        "model": st.fixed_dictionaries(
            {"path": words}, optional={"qlora_rank": st.integers(1, 512), "name": words}
        ),
        "teacher": st.fixed_dictionaries({"path": words}),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "description": st.text(max_size=40),
        "data": st.fixed_dictionaries(
            {}, optional={"train_file": words | st.lists(words, min_size=1, max_size=3)}
        ),
        "trainer": st.fixed_dictionaries({}, optional={"learning_rate": numbers}),
        "algorithm": st.fixed_dictionaries({}, optional={"kl_penalty_coef": numbers}),
        "evals": st.lists(st.fixed_dictionaries({"step": st.integers(1, 99)}), max_size=2),
    },
)


@settings(max_examples=40, deadline=None)
@given(values=configs)
def test_round_trips(values: dict[str, Any]) -> None:
    config = Config(**values)
    assert Config(**to_dict(config)) == config
    assert Config(**json.loads(json.dumps(to_dict(config)))) == config
    assert Config(**parse_document(to_yaml(config), "c").data) == config


def test_resolved_yaml_is_a_config(tmp_path: Path) -> None:
    config = Config(dataset_type="distill", model={"path": "no"}, teacher={"path": "t"})
    path = tmp_path / "config.yml"
    path.write_text(to_yaml(config), encoding="utf-8")
    loaded = load_config(path)
    assert loaded.config == config
    assert loaded.warnings == []
    assert "kl_penalty_coef: 0.1" in to_yaml(config)


def test_hash() -> None:
    def make(**more: Any) -> Config:
        return Config(dataset_type="distill", model={"path": "s"}, teacher={"path": "t"}, **more)

    assert len(config_hash(make())) == 64
    assert config_hash(make()) == config_hash(make(data={"train_file": ["train.jsonl"]}))
    assert config_hash(make()) == config_hash(make(algorithm={"kl_penalty_coef": 0.1}))
    assert config_hash(make()) != config_hash(make(seed=1))
