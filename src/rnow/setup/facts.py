"""What a run says of itself: in its checkpoints, and to its audience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rnow.config import config_hash, to_dict
from rnow.disk.files import map_text, sha256_of
from rnow.models.resolve import tokenizer_hash
from rnow.models.weight_files import weights_fingerprint
from rnow.plan.choices import DEFAULT_MAX_TURNS
from rnow.plan.prepare import Prepared
from rnow.project.project import TOOLS_FILE
from rnow.setup.backends import Backends
from rnow.setup.parts import redactor
from rnow.setup.summary import device_name, versions


def build_facts(prepared: Prepared) -> dict[str, Any]:
    """What every checkpoint states about its run, JSON-ready, secrets redacted."""
    student, teacher = prepared.student, prepared.teacher
    folder = prepared.project.folder
    return {
        "config": redacted_config(prepared),
        "config_hash": config_hash(prepared.config),
        "seed": prepared.config.seed,
        "student": student.path,
        "student_revision": student.revision,
        "teacher": None if teacher is None else teacher.path,
        "teacher_revision": None if teacher is None else teacher.revision,
        "student_weights": weights_fingerprint(student.local_dir),
        "tokenizer_hash": tokenizer_hash(student.local_dir),
        "dataset_hash": prepared.project.dataset.content_hash,
        "rewards_hash": _hash_of(folder / "rewards.py"),
        "tools_hash": _hash_of(folder / TOOLS_FILE) if prepared.project.agentic else None,
        "tools": prepared.tools,
        "versions": versions(),
    }


def _hash_of(file: Path) -> str | None:
    return sha256_of(file) if file.is_file() else None


def redacted_config(prepared: Prepared) -> dict[str, Any]:
    """The resolved config without the project's secrets."""
    return map_text(to_dict(prepared.config), redactor(prepared))


def header_lines(prepared: Prepared, backends: Backends, run_dir: Path, done: int) -> list[str]:
    """``label: value`` lines shown when training begins."""
    config = prepared.config
    data, algorithm = config.data, config.algorithm
    student = backends.student
    dtype = str(student.head.weight.dtype).removeprefix("torch.")
    base = dtype if student.quantization == "none" else f"{student.quantization}, {dtype}"
    sampler = ", ".join(value for value in backends.sampler_facts.values() if value)
    lines = [
        f"student: {prepared.student.name}, LoRA rank {config.model.qlora_rank}, base {base}",
        f"teacher: {_teacher_name(prepared)}",
        f"objective: {algorithm.loss_fn}, kl_penalty_coef {algorithm.kl_penalty_coef:g}, "
        f"learning rate {config.trainer.learning_rate:g}",
        f"data: {len(prepared.project.dataset.prompts)} prompts, "
        f"{data.batch_size} x {data.group_size} rollouts per step, {prepared.num_steps} steps",
        f"sampler: {sampler}",
        *_tool_lines(prepared),
        f"device: {device_name(student.device)}",
        f"run folder: {run_dir}",
    ]
    return [*lines, f"continues: after step {done}"] if done else lines


def _teacher_name(prepared: Prepared) -> str:
    if prepared.teacher is not None:
        return prepared.teacher.name
    held = prepared.config.dataset_type == "rl" and prepared.config.algorithm.kl_penalty_coef > 0
    return "none; the rewards teach, and the base model holds the student near" if held else "none"


def _tool_lines(prepared: Prepared) -> list[str]:
    if not prepared.tools:
        return []
    turns = prepared.config.rollout.max_turns or DEFAULT_MAX_TURNS
    return [f"tools: {', '.join(prepared.tools)}; at most {turns} turns"]


def closing_lines(adapter: Path) -> list[str]:
    """Where the adapter is and how it is loaded."""
    return [
        f"adapter: {adapter}",
        "load it with:",
        "    from peft import AutoPeftModelForCausalLM",
        f'    model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")',
    ]
