"""What a run says of itself: in its checkpoints, when it begins, and when it is done (``summary.json``)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rnow.config import config_hash, to_dict
from rnow.config.estimator import has_value_head, kl_estimator
from rnow.config.teachers import TEACHER, control_of
from rnow.disk.answers import AnswerFiles
from rnow.disk.files import sha256_of
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import read_rows
from rnow.display.display import Display
from rnow.display.terminal import one_line
from rnow.models.adapter import describe
from rnow.models.resolve import tokenizer_hash
from rnow.models.weight_files import config_fingerprint, weights_fingerprint
from rnow.plan.choices import CONTROLS, DEFAULT_MAX_TURNS
from rnow.plan.prepare import Prepared
from rnow.plan.roles import STUDENT, teachers_of
from rnow.project.modules import imported_modules
from rnow.project.project import TOOLS_FILE
from rnow.setup.backends import Backends
from rnow.setup.objective import build_objective
from rnow.training.evaluations import AFTER, BEFORE
from rnow.training.evaluations import TEACHER as TEACHER_ROW

ANSWERS_SHOWN = 3
ANSWER_WIDTH = 160
"""Letters of a prompt or an answer that are shown."""

_PACKAGES = ("rnow-local", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def build_facts(prepared: Prepared) -> dict[str, object]:
    """What every checkpoint states about its run, JSON-ready, secrets redacted. ``plan.changes`` says what another value of
    each means."""
    import torch

    folder, trained = prepared.project.folder, prepared.student.resolved.local_dir
    redact = prepared.project.redact
    # Rows are learned as they are, and no code of the user's runs; where nothing is trained, they are questions.
    judged = prepared.config.on_policy or prepared.source is None
    agentic = judged and prepared.project.agentic
    models: dict[str, str | None] = {TEACHER: None, f"{TEACHER}_revision": None}
    teachers: dict[str, dict[str, str | None]] = {}
    for role, model in prepared.models.items():
        path, revision = redact(model.resolved.path), model.resolved.revision
        config = config_fingerprint(model.resolved.local_dir)
        # Of a model at a server the weights here, if any, are not those that run.
        here = model.role.trained or model.role.serving.url is None
        weights = weights_fingerprint(model.resolved.local_dir) if here else None
        if role in (STUDENT, TEACHER):
            own = {"revision": revision, "config": config, "weights": weights}
            if model.role.crosses:
                own["tokenizer"] = tokenizer_hash(model.resolved.local_dir)
            models |= {role: path, **{f"{role}_{name}": value for name, value in own.items()}}
        else:
            teachers[role] = {"path": path, "config": config, "weights": weights}
    return {
        "config": redacted_config(prepared),
        "config_hash": config_hash(prepared.config),
        "seed": prepared.config.seed,
        **models,
        "teachers": teachers,
        "start_adapter": prepared.start and prepared.start.content_hash(),
        "kl_estimator": kl_estimator(prepared.config),
        "value_head": has_value_head(prepared.config),
        "stop_ids": list(prepared.rendered.stop_ids),
        "tokenizer_hash": tokenizer_hash(trained),
        "dataset_hash": prepared.source and prepared.source.content_hash,
        "rewards_hash": _hash_of(folder / "rewards.py") if judged else None,
        "rewards_modules": _hash_modules(folder / "rewards.py") if judged else {},
        "tools_hash": _hash_of(folder / TOOLS_FILE) if agentic else None,
        "tools_modules": _hash_modules(folder / TOOLS_FILE) if agentic else {},
        "tools": redact.data(prepared.tools),
        "threads": torch.get_num_threads(),
        "template_date": _isoformat(prepared.rendered.template_date),
        "versions": versions(),
    }


def _hash_modules(file: Path) -> dict[str, str]:
    names = {path: path.relative_to(file.parent).as_posix() for path in imported_modules(file)}
    return {name: sha256_of(path) for path, name in names.items()}


def _isoformat(date: datetime | None) -> str | None:
    return date and date.isoformat(timespec="seconds")


def _hash_of(file: Path) -> str | None:
    return sha256_of(file) if file.is_file() else None


def redacted_config(prepared: Prepared) -> dict[str, object]:
    """The resolved config without the project's secrets."""
    return prepared.project.redact.data(to_dict(prepared.config))


def header_lines(prepared: Prepared, backends: Backends, run_dir: Path, done: int) -> list[str]:
    """``label: value`` lines shown when training begins."""
    config = prepared.config
    student = backends.student
    base = student.dtype
    if student.quantization != "none":
        base = f"{student.quantization}, {base}"
    sampler = ", ".join(value for value in backends.sampler_facts.values() if value)
    turns = config.rollout.max_turns or DEFAULT_MAX_TURNS
    named = ", ".join(prepared.tools)
    tools = [f"tools: {named}; at most {turns} turns"] if named else []
    found = control_of(config)
    control = [] if found is None else [f"control: {found.upper()}, {CONTROLS[found]}"]
    answering = [f"sampler: {sampler}", *tools] if config.on_policy else []
    lines = [
        f"student: {prepared.student.resolved.name}, LoRA rank {config.model.qlora_rank}, base {base}",
        *_start_lines(prepared),
        *(_teacher_lines(prepared) if config.on_policy else []),
        *control,
        f"objective: {build_objective(prepared).describe()}, "
        f"learning rate {config.trainer.learning_rate:g}",
        f"data: {prepared.source.summary}" if prepared.source else "data: none",
        *answering,
        f"device: {student.device}",
        f"run folder: {run_dir}",
    ]
    return [*lines, f"continues: after step {done}"] if done else lines


def _start_lines(prepared: Prepared) -> list[str]:
    start = prepared.start
    return [] if start is None else [f"starts from: {describe(start)}, with a fresh optimizer"]


def _teacher_lines(prepared: Prepared) -> list[str]:
    """One for each; of several, with what they judge."""
    teachers = {
        model.role.name: "the student's own base, adapter off"
        if model.own_base
        else model.resolved.name
        for model in teachers_of(prepared.models)
    }
    if prepared.several_teachers:
        judged = prepared.judged
        return [f"{role}: {name}, judges {judged[role]} prompts" for role, name in teachers.items()]
    held = prepared.config.dataset_type == "rl" and prepared.config.algorithm.kl_penalty_coef > 0
    kept = "the base model" if prepared.start is None else "the adapter it starts from"
    none = f"none; the rewards teach, and {kept} holds the student near" if held else "none"
    return [f"teacher: {next(iter(teachers.values()), none)}"]


def answer_lines(
    folder: RunFolder, answers: AnswerFiles, evaluations: Sequence[Mapping[str, object]]
) -> list[str]:
    """The first answers to a few held-out prompts, before and after training and by the teacher, as ``label: value``: prompts
    whose answer training changed come first."""
    steps = {str(row["name"]): row["step"] for row in evaluations}
    given = {
        name: answers.first_answers(name, step)
        for name in (BEFORE, AFTER, TEACHER_ROW)
        if isinstance(step := steps.get(name), int)
    }
    after = given.get(AFTER, {})
    if not after:
        return []
    before = given.get(BEFORE, {})
    # An answer that stayed as it was shows nothing of the training.
    changed_first = sorted(after.items(), key=lambda item: before.get(item[0], item[1]) == item[1])
    shown = changed_first[:ANSWERS_SHOWN]
    lines = [
        f"held-out answers, {len(shown)} of {len(after)} prompts, changed ones first; all are in {folder.answers}"
    ]
    for prompt_id, (asked, _) in shown:
        lines.append(f"prompt: {one_line(asked, ANSWER_WIDTH)}")
        for name, found in given.items():
            if prompt_id in found:
                lines.append(f"{name}: {one_line(found[prompt_id][1], ANSWER_WIDTH)}")
    return lines


def closing_lines(adapter: Path) -> list[str]:
    """Where the adapter is and how it is loaded."""
    return [
        f"adapter: {adapter}",
        "load it with:",
        "    from peft import AutoPeftModelForCausalLM",
        f'    model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")',
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The outcome of ``rnow run``. ``values`` is the content of summary.json, of which the properties are a part."""

    values: Mapping[str, Any]

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.values["run_dir"])

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, as PEFT loads it."""
        return Path(self.values["adapter"])

    @property
    def steps(self) -> int:
        """Steps trained, those of earlier attempts included."""
        return self.values["steps"]

    @property
    def teacher_kl(self) -> Mapping[str, Any]:
        """``first`` and ``last``: means over so many steps as ``averaged_steps`` says, None without a teacher."""
        return self.values["teacher_kl"]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """``before``, ``after`` and ``teacher``, each None where it was not evaluated."""
        return self.values["evaluation"]


def repeat(values: Mapping[str, Any], display: Display) -> None:
    """Show the result of a finished run once more."""
    evaluation = values.get("evaluation")
    for name, row in evaluation.items() if isinstance(evaluation, Mapping) else ():
        if isinstance(row, Mapping):
            numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
            display.evaluation(name, numbers)
    display.finish(closing_lines(Path(str(values.get("adapter")))))


def build_values(
    folder: RunFolder,
    *,
    steps: int,
    counters: Mapping[str, float],
    evaluations: Sequence[Mapping[str, object]],
    facts: Mapping[str, object],
    device: str,
    sampler: Mapping[str, str | None],
    control: str | None,
    on_policy: bool = True,
) -> dict[str, object]:
    """Collect summary.json.

    ``teacher_kl`` first and last are means over the first and last tenth of the steps (at least one): a single step is
    a handful of rollouts; ``averaged_steps`` says how many. A run that learns from rows has ``loss`` in the same form.
    ``teachers`` is there where others than ``teacher`` judge. Paths are absolute.
    """
    rows = read_rows(folder.metrics)
    last = {row["name"]: {key: row[key] for key in row if key != "name"} for row in evaluations}
    return {
        "status": "finished",
        "run_dir": str(folder.path.resolve()),
        "adapter": str(folder.adapter.resolve()),
        "steps": steps,
        "wall_seconds": round(counters["seconds"], 2),
        "completion_tokens": int(counters["completion_tokens"]),
        "teacher_kl": _course(rows, "teacher_kl"),
        **({} if on_policy else {"loss": _course(rows, "loss")}),
        "evaluation": {
            "before": last.get(BEFORE),
            "after": last.get(AFTER),
            "teacher": last.get(TEACHER_ROW),
        },
        "student": facts.get("student"),
        "teacher": facts.get("teacher"),
        **({"teachers": facts["teachers"]} if facts.get("teachers") else {}),
        "control": control,
        "sampler": dict(sampler),
        "device": device,
        "versions": facts.get("versions"),
        "config_hash": facts.get("config_hash"),
    }


def _course(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | int | None]:
    """How a metric began and ended."""
    series = [value for row in rows if (value := row.get(name)) is not None]
    tenth = max(1, len(series) // 10)
    return {
        "first": _mean(series[:tenth]),
        "last": _mean(series[-tenth:]),
        "averaged_steps": min(tenth, len(series)),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that shape the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
