"""Did you mean: from a key that does not exist to the one that does."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rnow.config.problems import KeyPath
from rnow.config.schema import LISTS, SECTIONS, Schema
from rnow.text.suggest import closest, did_you_mean

_MEANT = {
    "evals": "eval_step eval",
    "project_id": "dataset_id",
    "project_name": "dataset_name",
    "rollout.reasoning_mode": "thinking_mode thinking enable_thinking",
    "rollout.max_tool_response": "max_tool_response_chars",
    "trainer.learning_rate": "lr learningrate",
    "trainer.num_epochs": "epochs epoch num_train_epochs",
    "trainer.max_steps": "steps",
    "trainer.save_step": "save_steps save_every checkpoint_interval",
    "trainer.max_grad_norm": "grad_clip gradient_clipping",
    "trainer.warmup_steps": "warmup",
    "trainer.lr_schedule": "lr_scheduler lr_scheduler_type",
    "data.batch_size": "bs batch train_batch_size per_device_train_batch_size",
    "data.group_size": "num_generations num_rollouts rollouts_per_prompt n",
    "data.train_file": "dataset dataset_path train_data train_path file",
    "data.val_split": "val_size eval_split",
    "dataset_type": "type task",
    "model.path": (
        "student student_model student_path base_model model_path model_name model_name_or_path"
    ),
    "model.qlora_rank": "rank r lora_rank lora_r",
    "model.qlora_alpha": "lora_alpha alpha",
    "model.quantization": "load_in_4bit",
    "model.dtype": "torch_dtype precision",
    "teacher.path": "teacher_model teacher_path teacher_name",
    "algorithm.kl_penalty_coef": "beta kl_coef kl_coefficient kl_penalty kl_weight",
    "algorithm.loss_fn": "loss loss_function",
    "algorithm.adv_estimator": "advantage_estimator",
    "algorithm.kl_estimator": "estimator",
    "algorithm.clip_ratio_high": "clip_ratio",
    "rollout.max_context_window": "max_length max_seq_length max_seq_len context_window",
    "rollout.max_tokens": "max_new_tokens max_completion_length max_response_length",
    "rollout.temperature": "temp",
    "rollout.rollout_timeout": "timeout",
    "rollout.mcp_url": "mcp",
    "trackers": "report_to tracker loggers logger log_with tensorboard mlflow trackio",
    "wandb_project": "wandb",
    "wandb_name": "wandb_run_name",
    "model.name": "run_name",
    "seed": "random_seed",
    "output_dir": "output",
}
"""Key -> what it is called elsewhere, or was called."""

GONE = {
    "sampler.mode": "this key is gone: leave it out; for a vLLM server that runs already, set sampler.url"
}
"""Keys of earlier versions that nothing took the place of."""

ALIASES = {word: key for key, words in _MEANT.items() for word in words.split()}


KNOWN: Mapping[str, tuple[str, ...]] = {
    section: tuple(model.model_fields)
    for section, model in {**SECTIONS, **LISTS, "": Schema, "teachers": SECTIONS["teacher"]}.items()
}
"""Section -> its keys; the section "" is the top level. Keys of an entry of ``ENTRIES`` are named alone, and suggested only
inside it."""
ENTRIES = (*LISTS, "teachers")


def snake(word: str) -> str:
    """``learningRate`` and ``learning-rate`` -> ``learning_rate``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).replace("-", "_").replace(" ", "_").lower()


def suggest(path: KeyPath) -> str | None:
    """A hint for the unknown key at ``path``: the key that was probably meant, else the keys that exist there."""
    words = [part for part in path if isinstance(part, str)]
    section, written = ".".join(words[:-1]), words[-1]
    if (words[0] == "teachers" and len(words) > 2) or section == "data.train_file.teacher":
        section = "teachers"
    if gone := GONE.get(".".join(words)):
        return gone
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
    elsewhere = [s for s in KNOWN if s not in (*ENTRIES, section)]
    same = [_join(s, word) for s in elsewhere if word in KNOWN[s] and (s or word not in SECTIONS)]
    if same:
        return same[:3]
    # A section is no setting: to a word inside another section it says nothing.
    leaves = {
        leaf: _join(s, leaf) for s in elsewhere for leaf in KNOWN[s] if s or leaf not in SECTIONS
    }
    near = closest(word, [*leaves, *ALIASES], cutoff=0.8)
    return [leaves.get(near[0]) or ALIASES[near[0]]] if near else []


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section and section not in ENTRIES else key
