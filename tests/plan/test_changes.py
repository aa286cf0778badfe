"""What a resumed run may change."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.config import Config, to_dict
from rnow.config.keys import Change, Reader
from rnow.config.schema import KEYS
from rnow.errors import EXIT_BAD_INPUT, ConfigError
from rnow.plan.changes import ADDED, Changes, compare, measurement, refuse
from rnow.plan.unread import find_readers

FACTS = {
    "rewards_hash": "a",
    "student_revision": "abc",
    "tokenizer_hash": "1",
    "dataset_hash": "2",
    "teacher": "x",
}


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


READERS = find_readers(
    Config(
        dataset_type="distill",
        model={"path": "student", "device": "cpu"},
        teacher={"path": "teacher"},
    ),
    agentic=False,
)
ALL_READERS = frozenset(said.reader for said in KEYS.values() if said.reader is not None)


def compared(
    old: dict[str, Any],
    new: dict[str, Any],
    *,
    facts: dict[str, Any] | None = None,
    readers: frozenset[Reader] = READERS,
) -> Changes:
    """Two starts whose facts differ by the config, and by ``facts``."""
    return compare({**FACTS, "config": old}, {**FACTS, **(facts or {}), "config": new}, readers)


def changed(**changes: Any) -> Changes:
    return compared(config(), config(**changes))


def test_nothing_changed() -> None:
    assert changed() == Changes()


@pytest.mark.parametrize(
    "change",
    [
        {"wandb_project": "p"},
        {"trackers": ["mlflow"]},
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
        {"algorithm__kl_estimator": "sampled"},
        {"rollout__temperature": 0.7},
        {"rollout__max_tokens": 7},
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
        {"teacher__path": "other"},
        {"model__qlora_rank": 8},
        {"model__qlora_alpha": 8},
        {"model__lora_targets": "q_proj"},
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
    found = compared(config(), config(), facts={fact: "new"})
    assert len(found.refused) == 1
    assert compared(config(), config(), facts={"teacher": "y"}) == Changes()


def test_the_content_of_the_adapter_to_start_from_counts_and_not_its_path() -> None:
    found = compared(config(), config(model__adapter="runs/sft"), facts={"start_adapter": "a"})
    assert found.free == ("model.adapter: None -> runs/sft",)
    assert found.refused == ("the adapter that the run starts from changed",)
    old, new = ({**FACTS, "config": config(), "start_adapter": name} for name in (None, "a"))
    earlier = {key: value for key, value in old.items() if key != "start_adapter"}
    assert measurement(old, READERS) == measurement(earlier, READERS) != measurement(new, READERS)


def test_a_diff_shows_old_and_new() -> None:
    (line,) = changed(trainer__learning_rate=2e-5).warned
    assert line == "trainer.learning_rate: 0.0001 -> 2e-05"


def test_a_key_that_appears_is_a_change() -> None:
    old = config()
    del old["trainer"]["learning_rate"]
    found = compared(old, config())
    assert found.warned == ("trainer.learning_rate: None -> 0.0001",)


@pytest.mark.parametrize("key", ["trainer__num_epochs", "trainer__max_steps"])
def test_another_length_is_free_only_under_a_constant_rate(key: str) -> None:
    falling = {"trainer__lr_schedule": "linear"}
    found = compared(config(**falling), config(**falling, **{key: 7}))
    assert len(found.warned) == 1
    assert found.free == ()


def test_other_evaluation_settings_are_told() -> None:
    found = changed(evaluation__num_samples=2)
    assert found.measured == ("evaluation.num_samples: 4 -> 2",)
    assert found.warned == (), "no trained number depends on them"


def test_other_rewards_are_told() -> None:
    found = compared(config(), config(), facts={"rewards_hash": "b"})
    assert found.warned == ("rewards.py changed",)


# ---- what holds of an earlier start -----------------------------------------------------------------------------------

TABLE: dict[Change, str] = {
    "free": """
        project_id project_name description organization_id output_dir residency report trackers wandb_project wandb_name
        evals
        model.name model.description model.adapter teacher.url
        trainer.save_step trainer.save_minutes trainer.watchdog_minutes trainer.keep_checkpoints
        trainer.micro_batch_tokens trainer.gradient_checkpointing trainer.max_billing
        evaluation.teacher rollout.reward_timeout|answers
        teacher.protocol|vllm teacher
        teacher.device|local teacher
        teacher.device_map|local teacher
        teacher.residency|local teacher
        teacher.tensor_parallel_size|local vllm teacher
        teacher.gpu_memory_utilization|local vllm teacher
        teacher.max_num_batched_tokens|local vllm teacher
        sampler.gpu_memory_utilization|local vllm sampler
        sampler.max_num_seqs|vllm sampler
        sampler.tensor_parallel_size|local vllm sampler
        sampler.enforce_eager|local vllm sampler
        sampler.enable_prefix_caching|local vllm sampler
        sampler.batch_memory_gb|embedded sampler
    """,
    "length": "trainer.num_epochs trainer.max_steps",
    "warn": """
        algorithm.kl_penalty_coef algorithm.reward_coef algorithm.scale_rewards algorithm.drop_equal_groups|answers
        algorithm.kl_estimator algorithm.kl_baseline algorithm.kl_discount algorithm.divergence|answers
        algorithm.gae_lambda|value head
        algorithm.value_learning_rate|value head
        algorithm.kl_clamp|kl clamp
        algorithm.teacher_top_k|top k
        algorithm.loss_fn|surrogate
        algorithm.clip_ratio_low|surrogate
        algorithm.clip_ratio_high|surrogate
        algorithm.ratio_cap|importance ratio
        trainer.learning_rate trainer.updates_per_batch trainer.weight_decay trainer.adam_beta1 trainer.adam_beta2
        trainer.max_grad_norm trainer.warmup_steps trainer.lr_schedule
    """,
    "measures": """
        evaluation.max_prompts
        evaluation.num_samples evaluation.temperature evaluation.success_reward|answers
    """,
    "evaluates": """
        teacher.revision teacher.trust_remote_code teacher.tokenizer teacher.backend
        rollout.include_thinking|answers
        teacher.template teacher.system_prompt
        teacher.quantization|local teacher
        teacher.dtype|local teacher
        teacher.attn_implementation|local teacher
        teacher.served_model|vllm teacher
    """,
    "samples": "algorithm.kl_horizon|answers",
    "shapes": """
        teacher.agentic rollout.mcp_url
        rollout.max_tokens rollout.termination_policy rollout.rollout_timeout|answers
        rollout.temperature rollout.top_p rollout.top_k sampler.backend sampler.url|answers
        rollout.max_turns|several turns
        rollout.tool_timeout|tools
        rollout.max_tool_response|tools
        sampler.served_model|vllm sampler
        sampler.dtype|vllm sampler
        sampler.quantization|vllm sampler
    """,
    "judges": "teacher.path",
    "refuse": """
        dataset_type seed data.train_file data.batch_size data.val_split data.shuffle
        data.group_size algorithm.adv_estimator|answers
        model.path model.qlora_rank model.qlora_alpha model.lora_targets model.quantization model.dtype model.revision model.device
        model.attn_implementation model.trust_remote_code teacher.control rollout.reasoning_mode
        rollout.max_context_window
    """,
}
"""Class -> its keys, each with its reader where not every run reads it: whoever adds a key decides here too."""


def rows(text: str) -> dict[str, str]:
    """Key -> reader."""
    found = {}
    for line in text.strip().splitlines():
        if "|" in line:
            keys, reader = line.split("|")
            found |= dict.fromkeys(keys.split(), reader)
        else:
            found |= dict.fromkeys(line.split(), "every run")
    return found


def test_every_key_has_a_class_and_a_reader() -> None:
    declared = {key: (said.change, said.reader) for key, said in KEYS.items()}
    table = {
        key: (change, reader)
        for change, text in TABLE.items()
        for key, reader in rows(text).items()
    }
    assert declared == table


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("trainer.lr_")])
@pytest.mark.parametrize("readers", [ALL_READERS, frozenset({"every run"})])
def test_a_change_means_what_the_key_says(key: str, readers: frozenset[Reader]) -> None:
    old, new = config(), config()
    section, _, name = key.rpartition(".")
    (new[section] if section else new)[name] = "another"
    found = compared(old, new, readers=readers)
    said = KEYS[key]
    change = said.change if said.reader in readers else "free"
    assert len(found.free) == (change in ("free", "length"))
    assert len(found.warned) == (change in ("warn", "samples", "evaluates", "shapes"))
    assert len(found.measured) == (change == "measures")
    assert len(found.refused) == (change in ("refuse", "judges"))
    assert found.rollouts_hold == (change not in ("samples", "shapes", "refuse"))
    assert found.evaluations_hold == (change in ("free", "length", "warn", "samples"))


@pytest.mark.parametrize(
    "change",
    [
        {"teacher__url": "http://other:1"},
        {"evaluation__max_prompts": 7},
        {"rollout__tool_timeout": 5.0},
        {"sampler__max_num_seqs": 7},
        {"trainer__learning_rate": 2e-5},
        {"teacher__path": "other"},
    ],
)
def test_rollouts_hold(change: dict[str, Any]) -> None:
    assert changed(**change).rollouts_hold


def test_rollouts_do_not_hold_at_another_temperature() -> None:
    assert not changed(rollout__temperature=0.5).rollouts_hold


def test_with_tools_their_deadline_shapes_rollouts() -> None:
    found = compared(config(), config(rollout__tool_timeout=5.0), readers=READERS | {"tools"})
    assert not found.rollouts_hold


@pytest.mark.parametrize(
    ("fact", "rollouts", "evaluations"),
    [
        ("rewards_hash", True, False),
        ("teacher_revision", True, False),
        ("tools_hash", False, False),
        ("tools", False, False),
        ("versions", False, False),
        ("tokenizer_hash", False, False),
        ("student_weights", False, False),
        ("dataset_hash", False, False),
    ],
)
def test_what_holds_when_a_fact_changed(fact: str, rollouts: bool, evaluations: bool) -> None:
    found = compared(config(), config(), facts={fact: "new"})
    assert (found.rollouts_hold, found.evaluations_hold) == (rollouts, evaluations)


@pytest.mark.parametrize("fact", ["teacher_revision", "versions"])
def test_facts_that_are_not_told(fact: str) -> None:
    found = compared(config(), config(), facts={fact: "new"})
    assert (found.free, found.warned, found.refused) == ((), (), ())


@pytest.mark.parametrize("fact", sorted(ADDED))
def test_a_fact_that_an_earlier_version_did_not_keep_is_unknown(fact: str) -> None:
    assert compared(config(), config(), facts={fact: "new"}) == Changes()
    both = {**FACTS, "config": config()}
    assert compare(both | {fact: "old"}, both | {fact: None}, READERS) == Changes()


@pytest.mark.parametrize(
    ("fact", "old", "new", "line", "kind"),
    [
        ("threads", 2, 1, "the number of CPU threads changed: 2 -> 1", "free"),
        ("stop_ids", [1], [1, 2], "student and teacher) changed: [1] -> [1, 2]", "warned"),
        ("template_date", "2026-01-01", "2026-01-02", "that chat templates print", "warned"),
        ("teacher_weights", "aaaa", "bbbb", "the teacher's weights changed", "refused"),
        ("teacher_config", "aaaa", "bbbb", "the teacher's config.json changed", "refused"),
        ("student_config", "aaaa", "bbbb", "the student's config.json changed", "refused"),
        ("rewards_modules", {"a.py": "1"}, {"a.py": "2", "b.py": "1"}, ": a.py, b.py", "warned"),
        ("tools_modules", {"a.py": "1", "b.py": "1"}, {"a.py": "1"}, "changed: b.py", "warned"),
    ],
)
def test_what_a_changed_fact_says(fact: str, old: Any, new: Any, line: str, kind: str) -> None:
    same = {**FACTS, "config": config()}
    found = compare(same | {fact: old}, same | {fact: new}, READERS)
    (told,) = getattr(found, kind)
    assert line in told
    assert "aaaa" not in told


def test_of_an_unknown_start_nothing_holds() -> None:
    found = compare({}, {**FACTS, "config": config()}, READERS)
    assert not found.rollouts_hold
    assert not found.evaluations_hold


def test_a_key_of_another_version_of_the_format_shapes_rollouts() -> None:
    old = config()
    old["sampler"]["spin"] = 1
    found = compared(old, config())
    assert found.warned == ("sampler.spin: 1 -> None",)
    assert not found.rollouts_hold


def test_a_key_that_is_gone_at_the_value_it_had_is_no_change() -> None:
    old: dict[str, object] = {"config": {"sampler": {"mode": "engine"}}}
    new: dict[str, object] = {"config": {"sampler": {}}}
    found = compare(old, new, frozenset({"every run"}))
    assert found.lines == ()
    assert found.rollouts_hold
    other = compare({"config": {"sampler": {"mode": "server"}}}, new, frozenset({"every run"}))
    assert not other.rollouts_hold


# ---- which evaluations can be compared -------------------------------------------------------------------------------


def measured(facts: dict[str, Any] | None = None, **changes: Any) -> str:
    return measurement({**FACTS, **(facts or {}), "config": config(**changes)}, READERS)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation__num_samples": 8},
        {"evaluation__max_prompts": 8},
        {"evaluation__success_reward": 0.5},
        {"evaluation__temperature": 0.5},
        {"rollout__max_tokens": 7},
        {"teacher__path": "other"},
        {"facts": {"rewards_hash": "b"}},
        {"facts": {"teacher_revision": "b"}},
    ],
)
def test_evaluations_of_other_settings_cannot_be_compared(changes: dict[str, Any]) -> None:
    assert measured(**changes) != measured()


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__learning_rate": 1.0},
        {"trainer__num_epochs": 9},
        {"evaluation__teacher": False},
        {"evals": [{"step": 3}]},
        {"sampler__max_num_seqs": 7},
        {"facts": {"versions": {"torch": "9"}}},
    ],
)
def test_evaluations_that_differ_by_the_weights_can(changes: dict[str, Any]) -> None:
    assert measured(**changes) == measured()


def test_a_key_at_its_default_that_another_version_has_makes_no_difference() -> None:
    older = config()
    del older["evaluation"]["max_prompts"]
    del older["rollout"]["top_k"]
    assert measurement({**FACTS, "config": older}, READERS) == measured()
    del older["rollout"]["max_tokens"]
    assert measurement({**FACTS, "config": older}, READERS) == measured()


def test_a_key_that_an_older_run_did_not_have_is_no_change_at_its_default() -> None:
    old = config()
    del old["model"]["lora_targets"]
    assert compared(old, config()) == Changes()
    assert len(compared(old, config(model__lora_targets="q_proj")).refused) == 1
    del old["teacher"]["tokenizer"]
    assert compared(old, config()) == Changes()
    assert len(compared(old, config(teacher__tokenizer="cross")).warned) == 1
    without = {"dataset_type": "rl", "model": {"path": "student"}}
    assert compared(to_dict(Config(**without)), to_dict(Config(**without))) == Changes()


# ---- several teachers ------------------------------------------------------------------------------------------------

MATH = {"path": "m", "weights": "1", "config": "1"}
FILES = [{"path": "a.jsonl", "name": "words", "teacher": {"path": "./o"}}]


def taught(teachers: dict[str, Any] | None = None, files: Any = None, **facts: Any) -> Any:
    """The facts of a run whose rows are judged by ``math``, and those of the dataset words by a teacher of its own."""
    values = {
        "dataset_type": "distill",
        "model": {"path": "student"},
        "teachers": {"math": {"path": "m"}} if teachers is None else teachers,
        "data": {"train_file": FILES if files is None else files},
    }
    used = {"teacher/math": MATH, "teacher/words": MATH | {"path": "./o"}} | facts
    return {**FACTS, "config": to_dict(Config(**values)), "teachers": used}


def test_nothing_changed_of_several_teachers() -> None:
    assert compare(taught(), taught(), READERS) == Changes()


@pytest.mark.parametrize(
    ("new", "refused", "free", "warned"),
    [
        (taught({"math": {"path": "n"}}, **{"teacher/math": MATH | {"path": "n"}}), ["teachers.math.path: m -> n"], [], []),
        (taught(**{"teacher/math": MATH | {"weights": "2"}}), ["the weights of teacher/math changed"], [], []),
        (taught(**{"teacher/words": MATH | {"path": "./o", "config": "2"}}), ["the config.json of teacher/words changed"], [], []),
        (taught(**{"teacher/code": MATH}), ["teacher/code judges rows now"], [], []),
        (taught({"math": {"path": "m", "device": "cpu"}}), [], ["teachers.math.device: auto -> cpu"], []),
        (taught(files=[{**FILES[0], "teacher": {"path": "./o", "device": "cpu"}}]), [], ["teachers.words.device: auto -> cpu"], []),
        (taught(files=[{**FILES[0], "teacher": "./o"}]), [], [], []),
        (taught({"math": {"path": "m"}, "idle": {"path": "x"}}), [], [], []),
        (taught({"math": {"path": "m", "dtype": "float32"}}), [], [], ["teachers.math.dtype: auto -> float32"]),
        (taught({"math": {"path": "m", "served_model": "x"}}), [], ["teachers.math.served_model: None -> x"], []),
    ],
)  # fmt: skip
def test_what_a_change_of_one_teacher_means(
    new: Any, refused: list[str], free: list[str], warned: list[str]
) -> None:
    found = compare(taught(), new, READERS)
    assert (list(found.refused), list(found.free), list(found.warned)) == (refused, free, warned)
    assert found.rollouts_hold, "the student drew them"
    assert found.evaluations_hold == (not refused and not warned)


def test_another_teacher_for_a_dataset_is_refused() -> None:
    found = compare(taught(), taught(files=[{**FILES[0], "teacher": "math"}]), READERS)
    assert any(line.startswith("data.train_file") for line in found.refused)


def test_several_teachers_where_an_earlier_version_had_one() -> None:
    old = {**FACTS, "config": config()}
    found = compare(old, taught(), READERS)
    assert "teacher/math judges rows now" in found.refused


def test_evaluations_by_other_teachers_cannot_be_compared() -> None:
    def measured_by(facts: Any) -> str:
        return measurement(facts, READERS)

    assert measured_by(taught()) != measured_by(taught(**{"teacher/math": MATH | {"weights": "2"}}))
    assert measured_by(taught()) == measured_by(taught({"math": {"path": "m", "device": "cpu"}}))
    assert measured_by(taught()) == measured_by(
        taught({"math": {"path": "m"}, "idle": {"path": "x"}})
    )


@pytest.mark.parametrize(
    ("was", "now", "lines"),
    [
        ("exact", "exact", ()),
        ("exact", "topk", ("algorithm.kl_estimator: exact -> topk",)),
        (None, "topk", ()),
    ],
)
def test_what_auto_chooses_is_compared(was: str | None, now: str, lines: tuple[str, ...]) -> None:
    """A teacher that moves behind a server may, and changes the objective, which is told. An earlier version kept no choice."""
    old = {**FACTS, "kl_estimator": was, "config": config()}
    served = config(teacher={"path": "teacher", "url": "http://h:1"})
    found = compare(old, {**FACTS, "kl_estimator": now, "config": served}, READERS)
    assert found.warned == lines
    assert not found.refused


def test_a_choice_that_is_written_out_is_no_change() -> None:
    facts = {**FACTS, "kl_estimator": "exact"}
    new = {**facts, "config": config(algorithm={"kl_estimator": "exact"})}
    assert compare({**facts, "config": config()}, new, READERS) == Changes()


def test_a_value_head_cannot_be_had_later() -> None:
    """Of the keys that decide it, reward_coef alone may change."""
    old, new = (
        config(algorithm__adv_estimator="gae"),
        config(algorithm__adv_estimator="gae", algorithm__reward_coef=1.0),
    )
    found = compare(
        {**FACTS, "value_head": False, "config": old},
        {**FACTS, "value_head": True, "config": new},
        READERS,
    )
    assert found.refused == (
        "the value head (adv_estimator: gae with reward_coef above 0) changed: False -> True",
    )
