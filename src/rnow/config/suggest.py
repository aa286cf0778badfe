"""Did you mean: from a key that does not exist to the one that does."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rnow.config.problems import KeyPath
from rnow.config.schema import LISTS, SECTIONS, Schema
from rnow.text.suggest import closest, did_you_mean

ALIASES = {
    "eval_step": "evals",
    "dataset_id": "project_id",
    "dataset_name": "project_name",
    "thinking_mode": "rollout.reasoning_mode",
    "max_tool_response_chars": "rollout.max_tool_response",
    "lr": "trainer.learning_rate",
    "learningrate": "trainer.learning_rate",
    "epochs": "trainer.num_epochs",
    "epoch": "trainer.num_epochs",
    "num_train_epochs": "trainer.num_epochs",
    "steps": "trainer.max_steps",
    "save_steps": "trainer.save_step",
    "save_every": "trainer.save_step",
    "checkpoint_interval": "trainer.save_step",
    "grad_clip": "trainer.max_grad_norm",
    "gradient_clipping": "trainer.max_grad_norm",
    "warmup": "trainer.warmup_steps",
    "lr_scheduler": "trainer.lr_schedule",
    "lr_scheduler_type": "trainer.lr_schedule",
    "bs": "data.batch_size",
    "batch": "data.batch_size",
    "train_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "num_generations": "data.group_size",
    "num_rollouts": "data.group_size",
    "rollouts_per_prompt": "data.group_size",
    "n": "data.group_size",
    "dataset": "data.train_file",
    "dataset_path": "data.train_file",
    "train_data": "data.train_file",
    "train_path": "data.train_file",
    "file": "data.train_file",
    "val_size": "data.val_split",
    "eval_split": "data.val_split",
    "type": "dataset_type",
    "task": "dataset_type",
    "student": "model.path",
    "student_model": "model.path",
    "student_path": "model.path",
    "base_model": "model.path",
    "model_path": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "rank": "model.qlora_rank",
    "r": "model.qlora_rank",
    "lora_rank": "model.qlora_rank",
    "lora_r": "model.qlora_rank",
    "lora_alpha": "model.qlora_alpha",
    "alpha": "model.qlora_alpha",
    "load_in_4bit": "model.quantization",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "teacher_model": "teacher.path",
    "teacher_path": "teacher.path",
    "teacher_name": "teacher.path",
    "beta": "algorithm.kl_penalty_coef",
    "kl_coef": "algorithm.kl_penalty_coef",
    "kl_coefficient": "algorithm.kl_penalty_coef",
    "kl_penalty": "algorithm.kl_penalty_coef",
    "kl_weight": "algorithm.kl_penalty_coef",
    "loss": "algorithm.loss_fn",
    "loss_function": "algorithm.loss_fn",
    "advantage_estimator": "algorithm.adv_estimator",
    "estimator": "algorithm.kl_estimator",
    "clip_ratio": "algorithm.clip_ratio_high",
    "max_length": "rollout.max_context_window",
    "max_seq_length": "rollout.max_context_window",
    "max_seq_len": "rollout.max_context_window",
    "context_window": "rollout.max_context_window",
    "max_new_tokens": "rollout.max_tokens",
    "max_completion_length": "rollout.max_tokens",
    "max_response_length": "rollout.max_tokens",
    "temp": "rollout.temperature",
    "thinking": "rollout.reasoning_mode",
    "enable_thinking": "rollout.reasoning_mode",
    "timeout": "rollout.rollout_timeout",
    "mcp": "rollout.mcp_url",
    "eval": "evals",
    "wandb": "wandb_project",
    "wandb_run_name": "wandb_name",
    "run_name": "model.name",
    "random_seed": "seed",
    "output": "output_dir",
}


KNOWN: Mapping[str, tuple[str, ...]] = {
    section: tuple(model.model_fields)
    for section, model in {**SECTIONS, **LISTS, "": Schema}.items()
}
"""Section -> its keys; the section "" is the top level. Keys of a list are named alone, and suggested only inside it."""


def snake(word: str) -> str:
    """``learningRate`` and ``learning-rate`` -> ``learning_rate``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).replace("-", "_").replace(" ", "_").lower()


def suggest(path: KeyPath) -> str | None:
    """A hint for the unknown key at ``path``: the key that was probably meant, else the keys that exist there."""
    words = [part for part in path if isinstance(part, str)]
    section, written = ".".join(words[:-1]), words[-1]
    if written == "<<":
        return "merge keys are not part of YAML 1.2; write the keys out"
    if not section and "." in written:
        *outer, written = written.split(".")
        section = ".".join(outer)
        if written in KNOWN.get(section, ()):
            return f"write {written} inside the section {section}"
    found = keys_like(section, snake(written))
    if found:
        return did_you_mean(found)
    here = KNOWN.get(section)
    return f"known here: {', '.join(here)}" if here else None


def keys_like(section: str, word: str) -> list[str]:
    """Dotted keys that ``word`` in ``section`` may have meant, the best first."""
    here = KNOWN.get(section, ())
    if word in here:
        return [_join(section, word)]
    if word in ALIASES:
        return [ALIASES[word]]
    near = closest(word, here, cutoff=0.75)
    if near:
        return [_join(section, near[0])]
    elsewhere = [s for s in KNOWN if s not in (*LISTS, section)]
    same = [_join(s, word) for s in elsewhere if word in KNOWN[s]]
    if same:
        return same[:3]
    leaves = {leaf: _join(s, leaf) for s in elsewhere for leaf in KNOWN[s]}
    near = closest(word, [*leaves, *ALIASES], cutoff=0.8)
    return [leaves.get(near[0]) or ALIASES[near[0]]] if near else []


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section and section not in LISTS else key
