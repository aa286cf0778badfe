"""What a resumed run may change."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config, to_dict
from rnow.errors import EXIT_BAD_INPUT, ConfigError
from rnow.plan.changes import Changes, compare, refuse

FACTS = {"student_revision": "abc", "tokenizer_hash": "1", "dataset_hash": "2", "teacher": "x"}


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            values[section] = {**values.get(section, {}), key: value}
        else:
            values[section] = value
    return to_dict(Config(**values))


def changed(**changes: Any) -> Changes:
    return compare(config(), config(**changes), FACTS, FACTS)


def test_nothing_changed() -> None:
    assert changed() == Changes()


@pytest.mark.parametrize(
    "change",
    [
        {"wandb_project": "p"},
        {"trainer__save_step": 5},
        {"trainer__num_epochs": 3},
        {"trainer__max_steps": 9},
        {"trainer__micro_batch_tokens": 128},
        {"model__name": "other"},
        {"evals": [{"step": 3}]},
        {"output_dir": "elsewhere"},
    ],
)
def test_free(change: dict[str, Any]) -> None:
    found = changed(**change)
    assert len(found.free) >= 1
    assert (found.warned, found.refused) == ((), ())
    refuse(found, where="runs/x")


@pytest.mark.parametrize(
    "change",
    [
        {"trainer__learning_rate": 2e-5},
        {"algorithm__kl_penalty_coef": 0.5},
        {"algorithm__loss_fn": "importance_sampling"},
        {"rollout__temperature": 0.7},
        {"rollout__max_tokens": 7},
        {"teacher__path": "other"},
        {"teacher__quantization": "nf4"},
        {"trainer__updates_per_batch": 2},
    ],
)
def test_warned(change: dict[str, Any]) -> None:
    found = changed(**change)
    assert len(found.warned) == 1
    assert (found.free, found.refused) == ((), ())
    refuse(found, where="runs/x")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"model__path": "other"},
        {"model__qlora_rank": 8},
        {"model__qlora_alpha": 8},
        {"model__quantization": "nf4"},
        {"data__batch_size": 8},
        {"data__val_split": 0.5},
        {"data__train_file": "other.jsonl"},
        {"algorithm__adv_estimator": "reinforce"},
    ],
)
def test_refused(change: dict[str, Any]) -> None:
    found = changed(**change)
    assert len(found.refused) >= 1
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        refuse(found, where="runs/x")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "--fresh" in str(caught.value.fix)
    key = next(iter(change)).replace("__", ".")
    assert any(key in line for line in caught.value.details)


@pytest.mark.parametrize("fact", ["student_revision", "tokenizer_hash", "dataset_hash"])
def test_facts_that_the_config_does_not_show(fact: str) -> None:
    found = compare(config(), config(), FACTS, FACTS | {fact: "new"})
    assert len(found.refused) == 1
    assert compare(config(), config(), FACTS, FACTS | {"teacher": "y"}) == Changes()


def test_a_diff_shows_old_and_new() -> None:
    (line,) = changed(trainer__learning_rate=2e-5).warned
    assert line == "trainer.learning_rate: 0.0001 -> 2e-05"


def test_a_key_that_appears_is_a_change() -> None:
    old = config()
    del old["trainer"]["learning_rate"]
    found = compare(old, config(), FACTS, FACTS)
    assert found.warned == ("trainer.learning_rate: None -> 0.0001",)


@pytest.mark.parametrize("key", ["trainer__num_epochs", "trainer__max_steps"])
def test_another_length_is_free_only_under_a_constant_rate(key: str) -> None:
    falling = {"trainer__lr_schedule": "linear"}
    found = compare(config(**falling), config(**falling, **{key: 7}), FACTS, FACTS)
    assert len(found.warned) == 1
    assert found.free == ()


def test_other_evaluation_settings_are_told() -> None:
    assert len(changed(evaluation__num_samples=2).warned) == 1


def test_other_rewards_are_told() -> None:
    found = compare(
        config(), config(), {**FACTS, "rewards_hash": "a"}, {**FACTS, "rewards_hash": "b"}
    )
    assert found.warned == ("rewards.py changed",)
