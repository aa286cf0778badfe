"""Defaults, spellings and rules of the schema, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rnow.config import Config
from rnow.config.problems import InvalidValues
from rnow.errors import ConfigError


def make(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
    }
    return Config(**{**values, **changes})


def test_defaults_of_the_project_format() -> None:
    config = make()
    assert (config.data.batch_size, config.data.group_size, config.data.val_split) == (4, 4, 0.0)
    assert [(s.path, s.name) for s in config.data.sources] == [("train.jsonl", "dataset_0")]
    assert (config.model.qlora_rank, config.model.lora_alpha) == (32, 64)
    assert (config.algorithm.loss_fn, config.algorithm.adv_estimator) == ("ppo", "grpo")
    assert (config.algorithm.kl_penalty_coef, config.algorithm.reward_coef) == (0.1, 0.0)
    assert (config.trainer.num_epochs, config.trainer.save_step) == (1, -1)
    assert config.trainer.learning_rate == 1e-4
    assert (config.rollout.tool_timeout, config.rollout.rollout_timeout) == (60.0, None)
    assert config.rollout.termination_policy == "last_tool"
    assert config.rollout.include_thinking is False


def test_coefficients_of_rl() -> None:
    config = Config(dataset_type="rl", model={"path": "student"})
    assert (config.algorithm.kl_penalty_coef, config.algorithm.reward_coef) == (0.01, 1.0)
    config = Config(dataset_type="rl", model={"path": "s"}, algorithm={"kl_penalty_coef": 0.5})
    assert (config.algorithm.kl_penalty_coef, config.algorithm.reward_coef) == (0.5, 1.0)


def test_null_coefficients_and_empty_sections_mean_the_default() -> None:
    config = make(algorithm={"kl_penalty_coef": None}, trainer=None, evals=None)
    assert config.algorithm.kl_penalty_coef == 0.1
    assert config.trainer.num_epochs == 1
    assert config.evals == ()


@pytest.mark.parametrize("dataset_type", ["sft", "rl", "midtrain"])
def test_a_teacher_belongs_to_distill(dataset_type: str) -> None:
    assert Config(dataset_type=dataset_type, model={"path": "s"}).teacher is None
    with pytest.raises(ConfigError, match="only used with dataset_type distill"):
        make(dataset_type=dataset_type)


@pytest.mark.parametrize(
    ("train_file", "sources"),
    [
        ("a.jsonl", [("a.jsonl", "dataset_0", "train")]),
        (Path("a.jsonl"), [("a.jsonl", "dataset_0", "train")]),
        (
            ["a.jsonl", {"path": "b", "split": "test"}],
            [("a.jsonl", "dataset_0", "train"), ("b", "dataset_1", "test")],
        ),
        (
            [{"path": "a", "name": "math"}, "b"],
            [("a", "math", "train"), ("b", "dataset_1", "train")],
        ),
    ],
)
def test_spellings_of_train_file(train_file: Any, sources: list[tuple[str, str, str]]) -> None:
    config = make(data={"train_file": train_file})
    assert [(s.path, s.name, s.split) for s in config.data.sources] == sources


def test_one_student_in_a_list_is_that_student() -> None:
    assert make(model={"path": ["a"]}).model.path == "a"
    assert make(model={"path": Path("models/a")}).model.path == "models/a"
    with pytest.raises(ConfigError, match="lists 2 students") as caught:
        make(model={"path": ["a", "b"]})
    assert "-m a" in (caught.value.fix or "")


def test_one_mcp_server_or_several() -> None:
    assert make(rollout={"mcp_url": "localhost:8931"}).rollout.mcp_url == ("localhost:8931",)
    assert make(rollout={"mcp_url": ["a", "b"]}).rollout.mcp_url == ("a", "b")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "batch_size", "4"),
        ("data", "batch_size", True),
        ("data", "batch_size", 4.0),
        ("data", "batch_size", 0),
        ("data", "group_size", 0),
        ("data", "val_split", 1.0),
        ("data", "val_split", -0.1),
        ("data", "shuffle", 1),
        ("data", "train_file", []),
        ("data", "train_file", ""),
        ("data", "train_file", 3),
        ("model", "qlora_rank", 0),
        ("model", "quantization", "int8"),
        ("model", "path", None),
        ("teacher", "quantization", "auto"),
        ("algorithm", "kl_penalty_coef", -0.1),
        ("algorithm", "reward_coef", -1),
        ("algorithm", "ratio_cap", 1),
        ("algorithm", "clip_ratio_low", 0),
        ("algorithm", "kl_clamp", 0),
        ("rollout", "temperature", 0),
        ("rollout", "top_p", 1.5),
        ("rollout", "top_k", -2),
        ("rollout", "max_turns", 0),
        ("rollout", "tool_timeout", 0),
        ("rollout", "reasoning_mode", "easy"),
        ("trainer", "num_epochs", 0),
        ("trainer", "learning_rate", 0.0),
        ("trainer", "learning_rate", float("nan")),
        ("trainer", "learning_rate", float("inf")),
        ("trainer", "save_step", -2),
        ("trainer", "keep_checkpoints", 1),
        ("trainer", "gradient_checkpointing", "yes"),
        ("trainer", "gradient_checkpointing", 1),
        ("evaluation", "num_samples", 0),
    ],
)
def test_refused_values_name_their_key(section: str, key: str, value: Any) -> None:
    base = {"model": {"path": "s"}, "teacher": {"path": "t"}}.get(section, {})
    with pytest.raises(InvalidValues) as caught:
        make(**{section: {**base, key: value}})
    assert [p.key.split("[")[0] for p in caught.value.problems] == [f"{section}.{key}"]


def test_a_whole_number_is_a_number() -> None:
    assert make(trainer={"learning_rate": 1}).trainer.learning_rate == 1.0


@pytest.mark.parametrize("value", ["auto", True, False])
def test_gradient_checkpointing(value: Any) -> None:
    assert make(trainer={"gradient_checkpointing": value}).trainer.gradient_checkpointing is value


def test_evals_need_a_step() -> None:
    config = make(evals=[{"step": 10, "pass8": True, "pass8_temp": 0.7}])
    assert config.evals[0].pass1 is True
    assert config.evals[0].pass8_temp == 0.7
    with pytest.raises(ConfigError, match="missing"):
        make(evals=[{"name": "x"}])


def test_both_coefficients_zero() -> None:
    with pytest.raises(ConfigError, match="both 0"):
        make(algorithm={"kl_penalty_coef": 0, "reward_coef": 0})
    make(algorithm={"kl_penalty_coef": 0, "reward_coef": 1})


def test_rl_without_its_rewards_is_refused() -> None:
    """Its KL is to the student's own start: that alone keeps the student where it is."""
    rl = {"dataset_type": "rl", "teacher": None}
    with pytest.raises(ConfigError, match="reward_coef is 0"):
        make(**rl, algorithm={"kl_penalty_coef": 0.1, "reward_coef": 0})
    with pytest.raises(ConfigError, match="both 0"):
        make(**rl, algorithm={"kl_penalty_coef": 0, "reward_coef": 0})
    make(**rl, algorithm={"kl_penalty_coef": 0, "reward_coef": 0.5})


@pytest.mark.parametrize(
    ("estimator", "batch_size", "group_size", "refused"),
    [
        ("grpo", 4, 1, True),
        ("grpo", 1, 2, False),
        ("reinforce", 4, 1, False),
        ("reinforce", 1, 2, False),
        ("reinforce", 1, 1, True),
    ],
)
@pytest.mark.parametrize("kl_penalty_coef", [0.0, 0.1])
def test_a_reward_that_is_compared_with_nothing_is_refused(
    estimator: str, batch_size: int, group_size: int, refused: bool, kl_penalty_coef: float
) -> None:
    data = {"batch_size": batch_size, "group_size": group_size}
    algorithm = {"adv_estimator": estimator, "kl_penalty_coef": kl_penalty_coef, "reward_coef": 0.5}
    rl = {"dataset_type": "rl", "teacher": None}
    for kind in ({}, rl):
        if refused:
            with pytest.raises(ConfigError, match="group_size is 1") as caught:
                make(**kind, data=data, algorithm=algorithm)
            assert "data.group_size" in caught.value.render()
        else:
            make(**kind, data=data, algorithm=algorithm)


def test_a_group_of_one_is_enough_for_a_teacher() -> None:
    make(data={"group_size": 1})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("algorithm", "kl_estimator", "exact"),
        ("algorithm", "kl_estimator", "topk"),
        ("algorithm", "kl_baseline", "optimal"),
        ("algorithm", "kl_discount", 0.5),
        ("rollout", "temperature", 0.7),
        ("evaluation", "teacher", True),
    ],
)
def test_what_needs_tokens_that_student_and_teacher_share(
    section: str, key: str, value: Any
) -> None:
    cross = {"path": "teacher", "tokenizer": "cross"}
    with pytest.raises(
        ConfigError, match=f"{key} cannot go with teacher.tokenizer cross"
    ) as caught:
        make(teacher=cross, **{section: {key: value}})
    assert f"{section}.{key}" in caught.value.render()
    assert "a teacher with the student's tokenizer" in caught.value.render()
    make(teacher=cross, algorithm={"kl_estimator": "sampled"})
    with pytest.raises(ConfigError, match="forward needs those that the teacher would write"):
        make(teacher=cross, algorithm={"divergence": "forward"})
    make(**{section: {key: value}})


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}])
def test_a_truncated_distribution_is_refused_with_ppo(cut: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(cut))} .* cannot go with ppo") as caught:
        make(rollout=cut)
    assert "importance_sampling" in caught.value.render()
    make(rollout=cut, algorithm={"loss_fn": "importance_sampling"})


@pytest.mark.parametrize("cut", [{"top_p": 1.0}, {"top_k": 0}, {"top_k": -1}])
def test_what_cuts_nothing_goes_with_ppo(cut: dict[str, Any]) -> None:
    make(rollout=cut)


def test_wandb_from_python() -> None:
    config = make(wandb_project="p", wandb_name="n")
    assert (config.wandb_project, config.wandb_name) == ("p", "n")


def test_all_problems_at_once_and_at_most_ten() -> None:
    with pytest.raises(InvalidValues) as caught:
        make(data={"batch_size": 0}, trainer={"lr": 1, "num_epochs": "x"})
    assert [p.key for p in caught.value.problems] == [
        "data.batch_size",
        "trainer.num_epochs",
        "trainer.lr",
    ]
    with pytest.raises(InvalidValues) as caught:
        make(**{f"k{i}": 1 for i in range(14)})
    assert len(caught.value.details) == 10
    assert len(caught.value.more) == 4
    assert "... and 4 more; --all-errors lists them" in caught.value.render()
    assert "k13: " in caught.value.render(everything=True)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().data.batch_size = 8  # type: ignore[misc]


@pytest.mark.parametrize("name", ["before", "after", "teacher", "eval_1"])
def test_evaluation_names_that_are_taken(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Config(
            dataset_type="distill",
            model={"path": "a"},
            teacher={"path": "b"},
            data={"val_split": 0.5},
            evals=[{"step": 1, "name": name}, {"step": 2}],
        )


def test_a_dataset_cannot_take_the_name_of_a_metric() -> None:
    with pytest.raises(ConfigError, match="teacher_kl/k3"):
        Config(
            dataset_type="distill",
            model={"path": "a"},
            teacher={"path": "b"},
            data={"train_file": [{"path": "x.jsonl", "name": "k3"}]},
        )


@pytest.mark.parametrize(
    ("section", "fine"),
    [
        ({"quantization": "fp8", "backend": "vllm"}, True),
        ({"quantization": "fp8", "url": "http://h:1"}, True),
        ({"quantization": "fp8"}, False),
        ({"quantization": "fp8", "backend": "transformers"}, False),
        ({"quantization": "int8"}, True),
        ({"quantization": "int8", "backend": "vllm"}, False),
    ],
)
def test_each_engine_quantises_in_its_own_ways(section: dict[str, Any], fine: bool) -> None:
    values = {"dataset_type": "distill", "model": {"path": "s"}, "teacher": {"path": "t"} | section}
    if fine:
        Config(**values)
    else:
        with pytest.raises(ConfigError, match=section["quantization"]):
            Config(**values)


@pytest.mark.parametrize(
    ("key", "value"), [("url", "http://h:1"), ("backend", "vllm"), ("revision", "main")]
)
def test_the_students_own_base_is_nowhere_else(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="the base that the trainer holds anyway") as caught:
        make(teacher={"path": "self", key: value})
    assert f"teacher.{key}" in str(caught.value)
    assert make(teacher={"path": "self"}).teacher.own_base
    assert not make(teacher={"path": "./self", key: value}).teacher.own_base


@pytest.mark.parametrize(
    ("template", "lacks"),
    [
        ("Hint: {context}", "{prompt}"),
        ("{prompt} {Context}", "{context}"),
        ("{prompt}{context}", None),
    ],
)
def test_a_template_has_both_placeholders(template: str, lacks: str | None) -> None:
    teacher = {"path": "self", "template": template}
    if lacks is None:
        assert make(teacher=teacher).teacher.template == template
        return
    with pytest.raises(ConfigError, match=f"the template has no {lacks}"):
        make(teacher=teacher)


def test_self_beside_named_teachers_is_no_mistyped_name() -> None:
    sources = [{"path": "a.jsonl", "teacher": "self"}, {"path": "b.jsonl", "teacher": "big"}]
    config = make(teacher=None, teachers={"big": "x/y"}, data={"train_file": sources})
    assert config.data.sources[0].teacher == "self"
    sources[0]["teacher"] = "bug"
    with pytest.raises(ConfigError, match="no teacher is named bug"):
        make(teacher=None, teachers={"big": "x/y"}, data={"train_file": sources})
