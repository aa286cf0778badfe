"""What a run was told to do, what it was expected to need, and what it used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rnow.config import Config, split_by_default
from rnow.config.problems import KeyPath
from rnow.config.schema import field_at, key_of
from rnow.config.teachers import without_told
from rnow.disk.files import read_json_object
from rnow.disk.folder import RunFolder
from rnow.display.terminal import format_bytes, format_clock
from rnow.errors import RnowError
from rnow.report.curves import Curves
from rnow.report.text import MESSAGE, safe


def changed_settings(config: Mapping[str, Any]) -> dict[str, object]:
    """The keys of a config that are not as they are by default, with their defaults, JSON-ready; without what teachers alone are
    told, since a page is passed on.

    ``whole``: it is of a version whose keys this one does not know, and all of it is listed.
    """
    try:
        changed, _ = split_by_default(Config(**config))
    except (RnowError, TypeError, KeyError):
        return {"whole": True, "keys": _settings(config)}
    return {"whole": False, "keys": _settings(changed)}


def _settings(config: Mapping[str, Any]) -> list[dict[str, object]]:
    told = {key: without_told(value) for key, value in config.items()}
    return [_setting(path, value) for path, value in _flat(told)]


def _flat(data: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and value and len(path) < 2:
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _setting(path: KeyPath, value: object) -> dict[str, object]:
    field = field_at(path)
    said = None if field is None else key_of(field)
    default = ""
    if field is not None and said is not None and not field.is_required():
        default = said.default_text or ("" if field.default is None else _shown(field.default))
    return {
        "key": safe(".".join(map(str, path))),
        "value": safe(_shown(value), MESSAGE),
        "default": safe(default.replace("`", "")),
        "about": "" if field is None else safe((field.description or "").replace("`", "")),
    }


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def run_facts(folder: RunFolder) -> list[list[str]]:
    """Label and text of what a reader wants to know first: models, sampler, device, versions."""
    facts, summary = read_json_object(folder.facts), read_json_object(folder.summary)
    config = _section(facts, "config")
    sampler = " ".join(map(str, filter(None, _section(summary, "sampler").values())))
    versions = ", ".join(f"{name} {of}" for name, of in _section(facts, "versions").items())
    teachers = _section(facts, "teachers")
    found: dict[str, object] = {
        "kind": config.get("dataset_type"),
        "student": _model(facts, "student"),
        "starts from": _section(config, "model").get("adapter"),
        "teacher": _model(facts, "teacher") if config.get("dataset_type") == "distill" else None,
        **{name: _section(teachers, name).get("path") for name in teachers},
        "control": summary.get("control"),
        "sampler": sampler,
        "device": summary.get("device"),
        "seed": facts.get("seed"),
        "versions": versions,
    }
    return [[name, safe(value)] for name, value in found.items() if value not in (None, "")]


def _model(facts: Mapping[str, Any], role: str) -> str | None:
    path, revision = facts.get(role), facts.get(f"{role}_revision")
    return f"{path} @ {revision[:8]}" if path and isinstance(revision, str) else path


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def plan_against_use(folder: RunFolder, curves: Curves) -> list[list[str]]:
    """What was expected and what was used, as triples of text; of a run that kept no plan what was used alone."""
    plan, summary = read_json_object(folder.plan), read_json_object(folder.summary)
    lengths = [v for v in curves.values.get("completions/mean_length", ()) if v is not None]
    seconds = summary.get("wall_seconds") or curves.sums.get("time/step")
    rows = [
        ("steps", _number(plan.get("steps")), _number(curves.last_step)),
        *_memory(plan, curves),
        (
            "tokens of an answer",
            _number(plan.get("completion_tokens"), "at most {}"),
            f"{min(lengths):.1f} to {max(lengths):.1f}, means of steps" if lengths else "",
        ),
        (
            "tokens written",
            _number(plan.get("max_total_tokens"), "at most {}"),
            _number(curves.sums.get("tokens/completion")),
        ),
        *(
            (name, _bytes(plan.get(key), "at most {}"), _bytes(_size(path)))
            for name, key, path in (
                ("checkpoints", "checkpoints_bytes", folder.checkpoints),
                ("transcripts", "transcripts_bytes", folder.transcripts),
            )
        ),
        ("time", "", format_clock(seconds) if isinstance(seconds, int | float) else ""),
    ]
    return [[safe(text) for text in row] for row in rows if row[2]]


def _memory(plan: Mapping[str, Any], curves: Curves) -> Iterator[tuple[str, str, str]]:
    """Of the device that the student is on: the metric is of the fullest one."""
    devices = plan.get("devices")
    first = devices[0] if isinstance(devices, list) and devices else {}
    first = first if isinstance(first, Mapping) else {}
    info, most = _section(first, "info"), curves.largest.get("memory/peak_gb")
    name = f"memory of {info['name']}" if info.get("name") else "memory"
    # Of a CPU the metric is of the process, in which the program and its libraries are too.
    form = "{}, program and libraries included" if info.get("device") == "cpu" else "{}"
    yield name, _bytes(first.get("peak_bytes"), "at most {}"), _bytes(most and most * 1e9, form)


def _number(value: object, form: str = "{}") -> str:
    return form.format(f"{value:,.0f}") if isinstance(value, int | float) and value else ""


def _bytes(value: object, form: str = "{}") -> str:
    return form.format(format_bytes(value)) if isinstance(value, int | float) and value else ""


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:  # something was removed meanwhile
        return 0
