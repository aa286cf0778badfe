"""The faults whose reports are kept in golden/: name -> (file name, content, overrides)."""

from __future__ import annotations

BASE = """\
dataset_type: distill
data:
  train_file: train.jsonl
  batch_size: 4
  group_size: 4
model:
  path: Qwen/Qwen3-8B
teacher:
  path: Qwen/Qwen3-32B
algorithm:
  loss_fn: ppo
  kl_penalty_coef: 0.1
"""

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)

Case = tuple[str, str | bytes, tuple[str, ...]]


def yml(content: str | bytes, *overrides: str) -> Case:
    return ("config.yml", content, overrides)


def more(content: str, *overrides: str) -> Case:
    return yml(BASE + content, *overrides)


def json_file(content: str) -> Case:
    return ("config.json", content, ())


CASES: dict[str, Case] = {
    # the file as YAML
    "tab": more("trainer:\n\tlearning_rate: 1e-4\n"),
    "duplicate_key": yml(BASE.replace("  batch_size: 4\n", "  batch_size: 4\n  batch_size: 8\n")),
    "duplicate_section": more("teacher:\n  path: Qwen/Qwen3-14B\n"),
    "empty": yml(""),
    "only_comments": yml("# nothing yet\n\n"),
    "alias_bomb": yml(BOMB),
    "alias_to_itself": yml("a: &a\n  b: *a\n"),
    "undefined_alias": more("description: *.jsonl\n"),
    "nested_too_deep": yml("a: " + "[" * 2000 + "]" * 2000),
    "two_documents": more("---\nseed: 1\n"),
    "not_a_mapping": yml("- dataset_type: distill\n"),
    "tag": more("seed: !!python/object/apply:os.getpid []\n"),
    "merge_key": yml(
        BASE.replace("teacher:\n", "teacher:\n  <<: *m\n").replace("model:", "model: &m")
    ),
    "colon_in_text": more("description: first: try\n"),
    "open_bracket": more("evals: [{step: 3}\n"),
    "complex_key": more("? [a, b]\n: 1\n"),
    "bad_utf8": yml(BASE.encode() + b"description: caf\xe9\n"),
    "utf16": yml(BASE.encode("utf-16")),
    "control_character": more("description: a\x07b\n"),
    "lone_surrogate": more('description: "\\ud83d"\n'),
    "too_large": yml("#" * 1_000_001),
    # unknown keys and their aliases
    "unknown_trainer_lr": more("trainer:\n  lr: 1e-4\n"),
    "unknown_lr": more("lr: 1e-4\n"),
    "unknown_epochs": more("epochs: 3\n"),
    "unknown_bs": yml(BASE.replace("batch_size", "bs")),
    "unknown_typo": more("trainer:\n  learning_rat: 1e-4\n"),
    "unknown_section_typo": more("trainr:\n  learning_rate: 1e-4\n"),
    "unknown_elsewhere": more("learning_rate: 1e-4\n"),
    "unknown_dotted": more("trainer.num_epochs: 3\n"),
    "unknown_without_idea": more("evaluation:\n  zzz: 1\n"),
    "unknown_in_list": more("evals:\n  - step: 5\n    pas1: true\n"),
    "many_problems": more(
        "lr: 1\nepochs: 1\nbs: 1\nbeta: 1\nlora_rank: 1\nteacher_model: x\nkl_coef: 1\n"
        "seed: one\nmax_new_tokens: 5\ntrainer:\n  num_epochs: 0\n  learning_rate: fast\n"
    ),
    # wrong types and values
    "number_as_text": more("trainer:\n  num_epochs: '4'\n"),
    "bool_as_number": more("trainer:\n  learning_rate: true\n"),
    "float_as_int": more("trainer:\n  num_epochs: 2.0\n"),
    "yes_as_bool": more("sampler:\n  enforce_eager: no\n"),
    "number_as_model": yml(BASE.replace("Qwen/Qwen3-8B", "42")),
    "text_as_section": yml(
        BASE.replace("teacher:\n  path: Qwen/Qwen3-32B", "teacher: Qwen/Qwen3-32B")
    ),
    "list_as_number": more("seed: [1, 2]\n"),
    "null_value": yml(BASE.replace("batch_size: 4", "batch_size:")),
    "not_a_choice": yml(BASE.replace("ppo", "PPO")),
    "out_of_range": more("trainer:\n  learning_rate: 0\n"),
    "not_finite": more("trainer:\n  learning_rate: .nan\n"),
    "one_as_auto_or_bool": more("trainer:\n  gradient_checkpointing: 1\n"),
    "missing_dataset_type": yml(BASE.replace("dataset_type: distill\n", "")),
    "missing_model": yml(BASE.replace("model:\n  path: Qwen/Qwen3-8B\n", "")),
    "missing_teacher": yml(BASE.replace("teacher:\n  path: Qwen/Qwen3-32B\n", "")),
    "both_coefficients_zero": yml(BASE.replace("0.1", "0")),
    "reward_of_a_group_of_one": yml(BASE, "algorithm.reward_coef=1", "data.group_size=1"),
    "truncated_ppo": more("rollout:\n  top_p: 0.9\n", "rollout.top_k=20"),
    "same_dataset_name": yml(
        BASE.replace("train.jsonl", "[{path: a.jsonl, name: x}, {path: b.jsonl, name: x}]")
    ),
    # overrides
    "override_without_equals": yml(BASE, "trainer.learning_rate"),
    "override_without_key": yml(BASE, "=3"),
    "override_unknown": yml(BASE, "trainer.lr=1e-5"),
    "override_wrong_type": yml(BASE, "data.batch_size=many"),
    "override_not_yaml": yml(BASE, "data.train_file=[a.jsonl"),
    "override_of_a_section": yml(BASE, "model=Qwen/Qwen3-4B"),
    "override_below_a_value": yml(BASE, "seed.x=1"),
    # several students
    "student_twice": yml(BASE.replace("Qwen/Qwen3-8B", "[Qwen/Qwen3-8B, Qwen/Qwen3-8B]")),
    # legacy keys keep their place
    "legacy_wrong_value": more("rollout:\n  thinking_mode: sometimes\n"),
    # config.json
    "json_syntax": json_file('{\n\t"dataset_type": "distill",\n}\n'),
    "json_duplicate_key": json_file('{\n\t"seed": 1,\n\t"seed": 2\n}\n'),
    "json_unknown": json_file(
        '{\n\t"dataset_type": "distill",\n\t"model": {"path": "a"},\n'
        '\t"teacher": {"path": "b"},\n\t"learningRate": 1e-4\n}\n'
    ),
    "json_nan": json_file('{"seed": NaN}'),
    "json_nested_too_deep": json_file("[" * 100_000),
}
