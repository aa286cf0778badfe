"""The schema for editors takes what `load_config` takes, says what each key means, and refuses what is misspelt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rnow.config import load_config
from rnow.config.docs import MINIMAL
from rnow.config.json_schema import OTHER_FORMS, build_schema, schema_text
from rnow.config.legacy import REMOVED, RENAMED
from rnow.config.load import read_document
from rnow.config.problems import dotted
from rnow.config.schema import KEYS, LISTS, SECTIONS
from rnow.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted([*ROOT.glob("configs/*.yml"), *ROOT.glob("templates/*/config.yml")])
SCHEMA = build_schema()
CHECK = jsonschema.Draft7Validator(SCHEMA)
BASE: dict[str, Any] = {"dataset_type": "distill", "model": {"path": "s"}, "teacher": {"path": "t"}}

ACCEPTED: list[dict[str, Any]] = [
    {"trackers": "mlflow"},
    {"trackers": ["wandb", "tensorboard"]},
    {"trackers": None},
    {"report": False},
    {"model": {"path": ["s"]}},
    {"model": {"path": "s", "lora_targets": "q_proj"}},
    {"model": {"path": "s", "lora_targets": ["q_proj", "v_proj"], "qlora_alpha": None}},
    {"data": {"train_file": "a.jsonl"}},
    {"data": {"train_file": ["a.jsonl", {"path": "b.jsonl", "name": None, "teacher": "t"}]}},
    {"data": {"train_file": {"path": "a.jsonl", "teacher": {"path": "t", "dtype": "float32"}}}},
    {"data": {"val_split": None}},
    {"teachers": {"math": "org/math", "code": {"path": "org/code"}}},
    {"teachers": None},
    {"algorithm": {"kl_penalty_coef": None, "reward_coef": 1}},
    {"algorithm": {"drop_equal_groups": "auto"}},
    {"algorithm": {"drop_equal_groups": False}},
    {"rollout": {"mcp_url": "localhost:1"}},
    {"rollout": {"mcp_url": ["a:1", "b:2"], "top_k": -1}},
    {"rollout": {"mcp_url": None}},
    {"evals": {"step": 5}, "data": {"val_split": 0.1}},
    {"evals": [{"step": 5, "pass4": None, "pass1": None, "pass8": True}]},
    {"evals": None},
    {"eval_step": 5},
    {"trainer": {"eval_step": 5, "save_step": 0}},
    {"thinking_mode": "easy"},
    {"rollout": {"thinking_mode": "hard", "max_tool_response_chars": 400}},
    {"dataset_id": "x", "dataset_name": None},
    {"sampler": {"mode": "engine"}},
    *({section: None} for section in ("algorithm", "rollout", "sampler", "trainer", "evaluation")),
]
REFUSED: list[dict[str, Any]] = [
    {"trainer": {"lr": 1e-4}},
    {"trainr": {}},
    {"trainer": {"learning_rate": "fast"}},
    {"trainer": {"learning_rate": 0}},
    {"data": {"batch_size": 0}},
    {"data": {"batch_size": True}},
    {"data": {"train_file": []}},
    {"data": {"train_file": [{"name": "without a path"}]}},
    {"model": {"path": ""}},
    {"model": {}},
    {"dataset_type": "dpo"},
    {"trackers": "neptune"},
    {"trackers": ["wandb", "neptune"]},
    {"algorithm": {"drop_equal_groups": 1}},
    {"sampler": {"mode": "server"}},
    {"thinking_mode": "hardest"},
]


def write(folder: Path, sections: dict[str, Any]) -> Path:
    (folder / "config.yml").write_text(yaml.safe_dump(BASE | sections))
    return folder


def test_it_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert json.loads(schema_text()) == SCHEMA


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_takes_every_example(path: Path) -> None:
    CHECK.validate(read_document(path).data)


def test_it_takes_the_minimal_config() -> None:
    CHECK.validate(yaml.safe_load(MINIMAL))


@pytest.mark.parametrize("sections", ACCEPTED, ids=json.dumps)
def test_it_takes_every_spelling_that_is_read(sections: dict[str, Any], tmp_path: Path) -> None:
    load_config(write(tmp_path, sections))
    CHECK.validate(BASE | sections)


@pytest.mark.parametrize("sections", REFUSED, ids=json.dumps)
def test_it_refuses_what_is_refused(sections: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, sections))
    assert not CHECK.is_valid(BASE | sections)


def keys_of(properties: dict[str, Any], before: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((f"{before}{name}", node) for name, node in properties.items())


def all_keys() -> dict[str, dict[str, Any]]:
    """Every key of the schema by its dotted name."""
    found = dict(keys_of(SCHEMA["properties"]))
    for name, model in SECTIONS.items():
        found |= keys_of(SCHEMA["definitions"][model.__name__]["properties"], f"{name}.")
    for name, model in LISTS.items():
        found |= keys_of(SCHEMA["definitions"][model.__name__]["properties"], f"{name}[].")
    return found


def test_every_key_is_there_and_says_what_it_means() -> None:
    found = all_keys()
    assert KEYS.keys() <= found.keys()
    for name in KEYS:
        assert found[name]["description"].endswith("."), name
    assert "Default: 2 x `qlora_rank`." in found["model.qlora_alpha"]["description"]
    assert found["trainer.num_epochs"]["default"] == 1
    assert "title" not in found["trainer.num_epochs"]


def test_old_keys_are_marked() -> None:
    found = all_keys()
    for path in (*(old for old, *_ in RENAMED), *REMOVED):
        node = found[dotted(path)]
        assert node["deprecated"] is node["doNotSuggest"] is True
        assert node["description"].startswith("An old key: ")
    assert "write evals as a list" in found["eval_step"]["deprecationMessage"]


def test_no_form_is_of_a_key_that_is_gone() -> None:
    assert OTHER_FORMS.keys() <= all_keys().keys()
