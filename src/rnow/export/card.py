"""The model card of what a run trained: README.md beside the weights, and the course of training as a picture.

It says what was done, from what the run keeps of itself, in which secrets are taken out already. Folders of this machine are named by
their last part alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from rnow.disk.files import read_json_object, replace_file
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import read_rows
from rnow.display.history import followed_metric

CARD, CURVE = "README.md", "curve.png"

Form = Literal["adapter", "merged", "gguf"]
Facts = Mapping[str, Any]

_RELATION = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
_METHODS = {
    "distill": "on-policy distillation: the student wrote answers, and the teacher scored every token of them",
    "sft": "supervised fine-tuning on the answers in the data",
    "rl": "reinforcement learning from the rewards of its answers",
    "midtrain": "training on plain texts",
}
_COMPARED = ("pass@1", "pass@4", "pass@8", "reward/mean", "teacher_kl", "completions/mean_length")
_SIZE, _DPI = (6.4, 3.2), 110
"""Inches, and points in each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        facts: run.json.
        summary: summary.json; empty for a run that is not done.
        rows: of metrics.jsonl, up to ``step``.
        step: after which the weights are those of the card; None where nothing says so.
        final: they are those that the run ended with.
    """

    name: str
    facts: Facts
    summary: Facts
    rows: Sequence[Facts]
    step: int | None
    final: bool


def read_record(
    run: RunFolder, *, step: int | None = None, summary: Facts | None = None
) -> RunRecord:
    """Look into a run's folder.

    Args:
        step: of the weights; the last by default.
        summary: where summary.json is not written yet.
    """
    found = read_json_object(run.summary) if summary is None else summary
    last = found.get("steps")
    at = last if step is None else step
    rows = [row for row in read_rows(run.metrics) if at is None or row["step"] <= at]
    return RunRecord(
        name=run.path.resolve().name,
        facts=read_json_object(run.facts),
        summary=found,
        rows=rows,
        step=at if isinstance(at, int) else None,
        final=at == last,
    )


def write_card(folder: Path, record: RunRecord, *, form: Form = "adapter") -> None:
    """Write the card, and the picture where matplotlib is installed and there are two steps to join, each file in one step."""
    picture = draw_curve(record.rows)
    if picture is not None:
        replace_file(folder / CURVE, picture)
    replace_file(folder / CARD, card(record, form=form, picture=picture is not None).encode())


def card(record: RunRecord, *, form: Form, picture: bool) -> str:
    """The text of README.md.

    Args:
        picture: ``CURVE`` lies beside it.
    """
    facts, config = record.facts, _section(record.facts, "config")
    kind = str(config.get("dataset_type", ""))
    base = _model(facts.get("student"), facts.get("student_revision"))
    course = _course(record)
    lines = [
        *_front_matter(facts, form),
        f"# {_plain(record.name)}",
        "",
        f"{base or 'A language model'}, trained with rnow by {_METHODS.get(kind, 'rnow')}.",
        "",
        *_description(config),
        *_use(facts, form),
        "## What was done",
        "",
        "| | |",
        "|-|-|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in _done(record) if value),
        "",
        *(["## Figures", ""] if course or picture else []),
        *course,
        *([f"![{_followed(record.rows)} by step]({CURVE})", ""] if picture else []),
        "Written by the run itself; the base model's licence applies.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(facts: Facts, form: Form) -> Iterator[str]:
    """What the hub reads. Values are JSON, which YAML takes as it is."""
    yield "---"
    yield f"library_name: {'peft' if form == 'adapter' else 'gguf' if form == 'gguf' else 'transformers'}"
    yield "pipeline_tag: text-generation"
    if facts.get("student_revision") and isinstance(facts.get("student"), str):
        yield f"base_model: {json.dumps(facts['student'])}"
        yield f"base_model_relation: {_RELATION[form]}"
    yield "tags:"
    kind = str(_section(facts, "config").get("dataset_type", ""))
    tags = [
        "rnow",
        *(["lora"] if form == "adapter" else []),
        *(["distillation"] if kind == "distill" else []),
    ]
    yield from (f"  - {tag}" for tag in tags)
    yield "---"


def _description(config: Facts) -> Iterator[str]:
    """``model.description``, which is kept with what was trained."""
    text = _section(config, "model").get("description")
    if isinstance(text, str) and text.strip():
        yield from (_plain(text), "")


def _use(facts: Facts, form: Form) -> Iterator[str]:
    """How it is loaded."""
    if form == "gguf":
        yield from ("With Ollama: `ollama create NAME -f Modelfile`, where there is a Modelfile; with llama.cpp: `llama-server --jinja -m FILE.gguf`.", "")  # fmt: skip
        return
    what = "peft" if form == "adapter" else "transformers"
    kind = "AutoPeftModelForCausalLM" if form == "adapter" else "AutoModelForCausalLM"
    yield from (
        "```python",
        f"from {what} import {kind}",
        "from transformers import AutoTokenizer",
        "",
    )
    yield f'model = {kind}.from_pretrained("<this folder or repository>")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("<this folder or repository>")'
    yield from ("```", "")
    if form == "adapter" and not facts.get("student_revision"):
        yield from (
            "The base is named in `adapter_config.json` by its folder on the machine that trained it.",
            "",
        )


def _done(record: RunRecord) -> Iterator[tuple[str, str]]:
    facts, config = record.facts, _section(record.facts, "config")
    model, trainer, data = (_section(config, name) for name in ("model", "trainer", "data"))
    algorithm = _section(config, "algorithm")
    yield "base", _model(facts.get("student"), facts.get("student_revision"))
    yield "teacher", _teachers(facts)
    yield "data", _data(data)
    yield "data's hash", str(facts.get("dataset_hash") or "")[:16]
    if record.step is not None:
        ended = "" if record.final else " (a checkpoint)"
        yield "steps", f"{record.step}{ended}"
    per_step = f"{data.get('batch_size')} prompts" if "batch_size" in data else ""
    answers = config.get("dataset_type") in ("distill", "rl") and "group_size" in data
    yield "a step", f"{per_step}, {data['group_size']} answers each" if answers else per_step
    if "qlora_rank" in model:
        alpha = model.get("qlora_alpha") or 2 * model["qlora_rank"]
        yield (
            "adapter",
            f"LoRA, rank {model['qlora_rank']}, alpha {alpha}, {', '.join(map(str, model.get('lora_targets') or []))}",
        )
    held = {name: model.get(name) for name in ("quantization", "dtype")}
    yield "base held in", ", ".join(f"{name} {value}" for name, value in held.items() if value)
    if "learning_rate" in trainer:
        yield (
            "learning rate",
            f"{trainer['learning_rate']:g}, {trainer.get('lr_schedule', 'constant')}",
        )
    yield "signal", str(facts.get("kl_estimator") or "")
    if config.get("dataset_type") in ("distill", "rl"):
        weights = {name: algorithm.get(name) for name in ("kl_penalty_coef", "reward_coef")}
        yield (
            "weights",
            ", ".join(f"{name} {value}" for name, value in weights.items() if value is not None),
        )
    if control := record.summary.get("control"):
        yield "control", f"{control}: the teacher did not teach in this run"
    yield "seed", str(facts.get("seed", ""))
    yield "device", str(record.summary.get("device") or "")
    versions = _section(facts, "versions")
    yield "versions", ", ".join(f"{name} {value}" for name, value in versions.items())


def _course(record: RunRecord) -> list[str]:
    """The evaluation before, after and by the teacher, and how the followed metric began and ended."""
    lines = []
    evaluation = _section(record.summary, "evaluation")
    columns = {name: row for name, row in evaluation.items() if isinstance(row, Mapping)}
    if not record.final:
        columns.pop("after", None)
    names = [name for name in _COMPARED if any(name in row for row in columns.values())]
    if columns and names:
        lines += [
            f"| held-out prompts | {' | '.join(columns)} |",
            "|-|" + "-|" * len(columns),
            *(
                f"| {name} | {' | '.join(_number(row.get(name)) for row in columns.values())} |"
                for name in names
            ),
            "",
        ]
    series = [
        value for row in record.rows if (value := row.get(_followed(record.rows))) is not None
    ]
    if series:
        tenth = max(1, len(series) // 10)
        first, last = (sum(part) / tenth for part in (series[:tenth], series[-tenth:]))
        lines += [
            f"{_followed(record.rows)}: {first:.4g} in the first, {last:.4g} in the last {_steps(tenth)}.",
            "",
        ]
    return lines


def draw_curve(rows: Sequence[Facts]) -> bytes | None:
    """The followed metric by step, as PNG; None without matplotlib, or with fewer than two steps."""
    name = _followed(rows)
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if len(points) < 2:
        return None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color="#2a6fb0", linewidth=1.5)
        axes.set(
            xlabel="step",
            ylabel=f"{name} (nats a token)",
            ylim=(min(0.0, *(y for _, y in points)), None),
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        out = BytesIO()
        figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    except Exception:
        # An extra: neither a broken installation nor a cache that cannot be written ends a run.
        return None
    return out.getvalue()


def _followed(rows: Sequence[Facts]) -> str:
    return followed_metric(rows[-1]) if rows else "teacher_kl"


def _teachers(facts: Facts) -> str:
    names = [_model(facts.get("teacher"), facts.get("teacher_revision"))]
    names += [
        f"{role.removeprefix('teacher/')}: {_model(one.get('path'), None)}"
        for role, one in _section(facts, "teachers").items()
        if isinstance(one, Mapping)
    ]
    return ", ".join(name for name in names if name)


def _data(data: Facts) -> str:
    files = data.get("train_file")
    names = (
        [_last_part(one.get("path")) for one in files if isinstance(one, Mapping)]
        if isinstance(files, list)
        else []
    )
    held = data.get("val_split")
    return ", ".join(name for name in names if name) + (
        f"; {held:g} of the rows held out" if held else ""
    )


def _model(path: object, revision: object) -> str:
    """``Qwen/Qwen3-8B at 1a2b3c4d5e6f``; of a folder its name."""
    if not isinstance(path, str):
        return ""
    if isinstance(revision, str):
        return f"{path} at {revision[:12]}"
    return _last_part(path)


def _last_part(path: object) -> str:
    """A HuggingFace id stays whole; of a path of this machine, which may tell a user's name, its end does."""
    text = path if isinstance(path, str) else ""
    is_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return text if is_id else Path(text).name


def _section(values: Facts, name: str) -> dict[str, Any]:
    found = values.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """On one line, with nothing that a page would take for markup of its own."""
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "<>[]`*#" else letter for letter in flat)
