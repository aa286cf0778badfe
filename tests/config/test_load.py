"""From a file or folder to a Config: overrides, places, legacy keys, notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnow.config import SHORTHANDS, Config, LoadedConfig, load_config
from rnow.config.notices import find_notices
from rnow.config.output import dump_yaml
from rnow.config.overrides import parse_override
from rnow.config.schema import field_at
from rnow.config.strict_yaml import NULL
from rnow.errors import ConfigError

BASE = """\
dataset_type: distill
model:
  path: student
teacher:
  path: teacher
"""

Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)

    def write_and_load(more: str = "", *overrides: str) -> LoadedConfig:
        Path("config.yml").write_text(BASE + more, encoding="utf-8")
        return load_config("config.yml", overrides)

    return write_and_load


# places


def test_where(load: Load) -> None:
    loaded = load("evals:\n  - step: 3\n", "data.batch_size=8")
    assert loaded.places.where("teacher.path") == "config.yml:5 (teacher.path)"
    assert loaded.places.where("teacher.revision") == "config.yml:4 (teacher.revision)"
    assert loaded.places.where("trainer.num_epochs") == "config.yml (trainer.num_epochs)"
    assert loaded.places.where("data.batch_size") == "command line (data.batch_size)"
    assert loaded.places.where("evals[0].step") == "config.yml:7 (evals[0].step)"


@pytest.mark.parametrize("name", ["config.yml", "config.yaml", "config.json"])
def test_a_folder_holds_one_config(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no config"):
        load_config(tmp_path)
    values = {"dataset_type": "distill", "model": {"path": "s"}, "teacher": {"path": "t"}}
    (tmp_path / name).write_text(json.dumps(values, indent="\t" if name.endswith("json") else None))
    assert load_config(tmp_path).path == tmp_path / name
    assert Config.from_file(tmp_path) == Config(**values)
    other = "config.json" if name != "config.json" else "config.yml"
    (tmp_path / other).write_text("{}")
    with pytest.raises(ConfigError, match="more than one"):
        load_config(tmp_path)


def test_json_text_with_surrogate_pairs_and_tabs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{\t"dataset_type": "distill",\n\t"description": "\\ud83d\\ude00 \\u0041\\/",\n'
        '\t"model": {"path": "s"}, "teacher": {"path": "t"}}'
    )
    loaded = load_config(path)
    assert loaded.config.description == "\U0001f600 A/"
    assert loaded.places.where("description") == f"{path}:2 (description)"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nope.yml")


# overrides


def test_overrides_change_values_and_are_told(load: Load) -> None:
    loaded = load(
        "data:\n  batch_size: 2\n  train_file: train.jsonl\n",
        "trainer.learning_rate=2e-5",
        "data.batch_size=8",
        "data.train_file=[a.jsonl,b.jsonl]",
        "evaluation.teacher=false",
        "model.qlora_alpha=16",
        "data.group_size=4",
    )
    config = loaded.config
    assert config.trainer.learning_rate == 2e-5
    assert [s.path for s in config.data.sources] == ["a.jsonl", "b.jsonl"]
    assert config.evaluation.teacher is False
    assert loaded.changes == [
        "trainer.learning_rate: 1e-4 in distill and rl, 5e-5 in sft and midtrain (default) -> 2e-5",
        "data.batch_size: 2 -> 8",
        "data.train_file: train.jsonl -> [a.jsonl, b.jsonl]",
        "evaluation.teacher: auto (default) -> false",
        "model.qlora_alpha: 2 x qlora_rank (default) -> 16",
        "data.group_size: 4 (default) -> 4",
    ]


def test_the_last_override_wins(load: Load) -> None:
    loaded = load("seed: 1\n", "seed=2", "seed=3")
    assert loaded.config.seed == 3
    assert loaded.changes == ["seed: 1 -> 3"]
    assert load("seed: 1\n", "seed=1").changes == []


@pytest.mark.parametrize(
    "text", ["no", "2024", "true", "1e-5", "a: b", "@x", "a=b", "*", "#1", " x"]
)
def test_text_keys_take_text_as_it_stands(load: Load, text: str) -> None:
    loaded = load("", f"model.path={text}", f"model.name={text}")
    assert loaded.config.model.path == text
    assert loaded.config.model.name == text


def test_an_empty_override_unsets(load: Load) -> None:
    assert load("wandb_project: p\n", "wandb_project=").config.wandb_project is None
    assert load("wandb_project: p\n", "wandb_project=null").config.wandb_project is None
    assert load("", 'wandb_project="null"').config.wandb_project == "null"


def test_an_override_repairs_a_file(load: Load) -> None:
    assert (
        load("trainer:\n  num_epochs: zero\n", "trainer.num_epochs=2").config.trainer.num_epochs
        == 2
    )


def test_an_override_does_not_hide_an_empty_section(load: Load) -> None:
    assert load("trainer:\n", "trainer.num_epochs=2").config.trainer.num_epochs == 2


def test_shorthands_name_real_keys() -> None:
    for key in SHORTHANDS.values():
        assert field_at(tuple(key.split("."))) is not None, key


scalars = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(st.integers() | st.text(alphabet="abc1 .:'\"", max_size=8), max_size=4)
)


@settings(max_examples=100, deadline=None)
@given(value=scalars)
def test_overrides_are_typed_as_yaml(value: Any) -> None:
    override = parse_override("trainer.learning_rate=" + json.dumps(value))
    assert override.path == ("trainer", "learning_rate")
    assert override.value == value
    assert type(override.value) is type(value)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["C"]), min_size=1))
def test_any_text_survives_an_override(text: str) -> None:
    quoted = NULL.fullmatch(text) or text.startswith(('"', "'", "["))
    override = parse_override(
        "description=" + (json.dumps(text, ensure_ascii=False) if quoted else text)
    )
    assert override.value == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_override_is_read_or_refused(text: str) -> None:
    try:
        override = parse_override(text)
    except ConfigError as error:
        where = error.where
    else:
        where = ".".join(map(str, override.path))
    assert where


# legacy


@pytest.mark.parametrize(
    ("more", "warning", "key", "value"),
    [
        ("dataset_id: a\n", "dataset_id is an old key: write project_id", "project_id", "a"),
        (
            "dataset_name: a\n",
            "dataset_name is an old key: write project_name",
            "project_name",
            "a",
        ),
        (
            "rollout:\n  thinking_mode: hard\n",
            "rollout.thinking_mode is an old key: write rollout.reasoning_mode",
            "rollout.reasoning_mode",
            "high",
        ),
        (
            "rollout:\n  max_tool_response_chars: 4001\n",
            "rollout.max_tool_response_chars is an old key: write rollout.max_tool_response",
            "rollout.max_tool_response",
            1001,
        ),
        (
            "trainer:\n  save_step: 0\n",
            "trainer.save_step: 0 is an old value",
            "trainer.save_step",
            -1,
        ),
        (
            "trainer:\n  max_billing: 5\n",
            "trainer.max_billing is ignored",
            "trainer.max_billing",
            5.0,
        ),
    ],
)
def test_legacy_keys_warn_once(load: Load, more: str, warning: str, key: str, value: Any) -> None:
    loaded = load(more)
    assert len(loaded.warnings) == 1
    assert loaded.warnings[0].startswith(warning)
    found: Any = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("more", ["eval_step: 7\n", "trainer:\n  eval_step: 7\n"])
def test_legacy_eval_step(load: Load, more: str) -> None:
    loaded = load(more + "data:\n  val_split: 0.1\n")
    assert [entry.step for entry in loaded.config.evals] == [7]
    assert len(loaded.warnings) == 1
    assert loaded.places.where("evals[0].step").startswith("config.yml:")


def test_the_new_key_wins_over_the_old_one(load: Load) -> None:
    loaded = load("dataset_name: old\nproject_name: new\n")
    assert loaded.config.project_name == "new"
    assert loaded.warnings == [
        "dataset_name is an old key and ignored, because project_name is set"
    ]


def test_legacy_key_below_something_that_is_no_section(load: Load) -> None:
    with pytest.raises(ConfigError, match="rollout: expected a section"):
        load("rollout: 3\nthinking_mode: low\n")


# notices


@pytest.mark.parametrize("reward_coef", [0.0, 1.0])
def test_an_estimator_of_advantages_that_no_reward_teaches_by(
    load: Load, reward_coef: float
) -> None:
    loaded = load(f"algorithm:\n  adv_estimator: gae\n  reward_coef: {reward_coef}\n")
    told = [
        "algorithm.adv_estimator gae has no effect with reward_coef 0: rewards are tracked only"
    ]
    assert loaded.warnings == ([] if reward_coef else told)


IMPORTANCE = "algorithm:\n  loss_fn: importance_sampling\n"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (IMPORTANCE + "rollout:\n  top_p: 0.9\n", "top_p 0.9"),
        (IMPORTANCE + "rollout:\n  top_k: 20\n", "top_k 20"),
        ("data:\n  val_split: 0.1\nevals:\n  - {step: 1, eval_id: e}\n", "eval_id is ignored"),
    ],
)
def test_notices(load: Load, more: str, words: str) -> None:
    (warning,) = load(more).warnings
    assert words in warning


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_off_is_silent(load: Load, top_k: int) -> None:
    assert load(f"rollout:\n  top_k: {top_k}\n  top_p: 1.0\n").warnings == []


@pytest.mark.parametrize("kind", ["sft", "midtrain"])
def test_the_types_that_learn_from_rows_have_a_learning_rate_of_their_own(kind: str) -> None:
    def rate(**trainer: object) -> float:
        config = Config(dataset_type=kind, model={"path": "s"}, trainer=trainer)
        return config.trainer.learning_rate

    assert (rate(), rate(learning_rate=1e-4), rate(num_epochs=2)) == (5e-5, 1e-4, 5e-5)


def test_settings_of_answers_contradict_nothing_where_there_are_none() -> None:
    """ppo with top_p, or both coefficients at 0, are faults of a run that samples."""
    config = Config(
        dataset_type="sft",
        model={"path": "s"},
        algorithm={"kl_penalty_coef": 0.0, "reward_coef": 0.0},
        rollout={"top_p": 0.9},
    )
    assert find_notices(config) == []


def test_a_dumped_config_loads(load: Load) -> None:
    text = dump_yaml({"description": "no", "wandb_name": "1e-5", "seed": 3})
    config = load(text).config
    assert (config.description, config.wandb_name, config.seed) == ("no", "1e-5", 3)


def test_an_override_in_another_encoding() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse_override("model.name=caf\udce9")


def test_a_key_that_is_gone_is_dropped_with_a_warning(load: Load) -> None:
    loaded = load("sampler:\n  mode: engine\n")
    assert any("sampler.mode is an old key" in warning for warning in loaded.warnings)


@pytest.mark.parametrize("digits", [19, 309, 400])
def test_a_whole_number_that_no_counter_holds_is_refused(load: Load, digits: int) -> None:
    number = "9" * digits
    for key in ("trainer.num_epochs", "trainer.warmup_steps", "data.group_size"):
        with pytest.raises(ConfigError, match="more than 64 bits"):
            load("", f"{key}={number}")
    with pytest.raises(ConfigError) as caught:
        load(f"evals:\n  - step: {number}\n")
    assert "config.yml:7" in str(caught.value.where)


@pytest.mark.parametrize("digits", [399, 400, 401, 5000])
def test_a_learning_rate_of_400_digits_is_refused(load: Load, digits: int) -> None:
    with pytest.raises(ConfigError, match="number"):
        load("", f"trainer.learning_rate={'9' * digits}")


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("algorithm.kl_clamp", "1e308", "at most 1e+30"),
        ("algorithm.ratio_cap", "1e39", "at most 1e+30"),
        ("evaluation.success_reward", "-1e31", "at most 1e+30"),
        ("trainer.learning_rate", "1e-300", "at least 1e-30"),
        ("sampler.batch_memory_gb", "1e300", "at most 1e+30"),
    ],
)
def test_a_number_that_float32_does_not_hold_is_refused(
    load: Load, key: str, value: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match="float32") as caught:
        load("", f"{key}={value}")
    assert hint in str(caught.value.fix)


@pytest.mark.parametrize("value", ["1e-9", "1e9"])
@pytest.mark.parametrize("key", ["rollout.temperature", "evaluation.temperature"])
def test_temperatures_that_leave_no_distribution_are_refused(
    load: Load, key: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"{key}: must be at"):
        load("", f"{key}={value}")


@pytest.mark.parametrize("digits", ["١", "１２"])
def test_digits_of_other_scripts_are_no_number_and_not_suggested(load: Load, digits: str) -> None:
    with pytest.raises(ConfigError, match="expected a whole number") as caught:
        load("", f"seed={digits}")
    assert caught.value.fix is None


def test_null_leaves_out_what_the_hosted_format_lets_be_null(load: Load) -> None:
    config = load("data: {val_split: null}\nevals: [{step: 2, pass1: null, pass8: null}]\n").config
    assert config.data.val_split == 0
    assert (config.evals[0].pass1, config.evals[0].pass8) == (True, False)


def test_a_command_of_an_mcp_server_is_taken_as_it_stands(load: Load) -> None:
    config = load("", "rollout.mcp_url=stdio: prog --a {x: 1}").config
    assert config.rollout.mcp_url == ("stdio: prog --a {x: 1}",)
    assert load("", "rollout.mcp_url=[a:1, b:2]").config.rollout.mcp_url == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("override", "where", "says"),
    [
        ("a.b.c=1", "command line (a)", "unknown key"),
        ("evals.0.step=5", "command line (evals.0.step)", "evals='[{step: ...}]'"),
        ("data.train_file.0.path=x", "command line (data.train_file.0.path)", "the whole list"),
        ("trainer.learning_rate=inf", "command line (trainer.learning_rate)", "a finite number"),
        ("trainer.learning_rate=.inf", "command line (trainer.learning_rate)", "a finite number"),
        ("sampler.mode=server", "command line (sampler.mode)", "set sampler.url"),
        ("sampler.modle=x", "command line (sampler.modle)", "known here"),
    ],
)
def test_an_error_names_the_command_line(load: Load, override: str, where: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", override)
    assert caught.value.where == where
    assert says in str(caught.value)
    assert "did you mean model" not in str(caught.value)
    assert "\n" not in str(caught.value)
