"""A run's folder as a page. Nothing but the folder is read, so that any past run has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rnow.disk.files import read_json_object, replace_file
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import each_row
from rnow.display.terminal import format_clock, format_number
from rnow.report.curves import Curves, build_charts, other_metrics, read_curves
from rnow.report.evaluation import (
    evaluation_charts,
    evaluation_table,
    held_out_answers,
    success_reward,
)
from rnow.report.health import read_health
from rnow.report.page import render
from rnow.report.rollouts import Rollouts, read_rollouts
from rnow.report.settings import changed_settings, plan_against_use, run_facts
from rnow.report.text import safe


def has_something(folder: RunFolder) -> bool:
    """Whether there is anything to show of a run yet."""
    kept = (folder.metrics, folder.evaluations, folder.transcripts)
    return any(path.exists() for path in kept)


def write_report(
    folder: RunFolder, path: Path | None = None, *, seconds: float | None = None
) -> Path:
    """Write the page of a run, whole or not at all, and give its path.

    Args:
        path: ``report.html`` in the folder when not given.
        seconds: after so many no further transcript is looked at.

    Raises:
        OSError: the disk does not take it, or a file cannot be read.
    """
    path = path or folder.report
    deadline = None if seconds is None else time.monotonic() + seconds

    def enough() -> bool:
        return deadline is not None and time.monotonic() > deadline

    replace_file(path, build_report(folder, enough=enough))
    return path


def build_report(folder: RunFolder, *, enough: Callable[[], bool] = lambda: False) -> bytes:
    """The page of a run. ``enough``: see ``read_rollouts``."""
    name = safe(folder.path.resolve().name)
    curves = read_curves(each_row(folder.metrics))
    rollouts = read_rollouts(folder.transcripts, enough=enough)
    config = _config(folder)
    charts = build_charts(curves)
    data: dict[str, object] = {
        "name": name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": _state(folder, curves),
        "tiles": _tiles(folder, curves, rollouts),
        "health": read_health(curves),
        "facts": run_facts(folder),
        "sampled": read_json_object(folder.facts).get("kl_estimator", "sampled") == "sampled",
        "steps": curves.steps,
        "width": curves.width,
        "charts": [*charts, *evaluation_charts(folder)],
        "more": other_metrics(curves, charts),
        "evaluation": evaluation_table(folder, success_reward(config)),
        "heldOut": held_out_answers(folder),
        "settings": changed_settings(config) if config else None,
        "plan": plan_against_use(folder, curves),
        "tokens": rollouts.disagreement.tokens(),
        "places": rollouts.disagreement.charts(),
        "texts": rollouts.texts,
        "prompts": rollouts.prompts,
        "rollouts": rollouts.shown,
        "pairs": rollouts.pairs,
        "rule": rollouts.rule(),
        "lookedAt": {
            "steps": len(rollouts.steps),
            "ofSteps": rollouts.of_steps,
            "tokens": rollouts.tokens,
        },
    }
    return render(data, title=name)


def _config(folder: RunFolder) -> dict[str, Any]:
    """The config that a run was started with last; empty where it kept none."""
    found = read_json_object(folder.facts).get("config")
    if isinstance(found, dict):
        return found
    try:
        found = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _planned_steps(folder: RunFolder) -> int | None:
    for file in (folder.plan, folder.process):
        steps = read_json_object(file).get("steps")
        if isinstance(steps, int):
            return steps
    return None


def _state(folder: RunFolder, curves: Curves) -> str:
    done = read_json_object(folder.summary).get("steps")
    if isinstance(done, int) and done >= curves.last_step:
        return f"finished after {done:,} steps"
    planned = _planned_steps(folder)
    of = f" of {planned:,}" if planned else ""
    return f"after step {curves.last_step:,}{of}; not finished"


def _tiles(folder: RunFolder, curves: Curves, rollouts: Rollouts) -> list[list[str]]:
    """The few numbers that say most: label, number, and where it began."""
    tiles = []
    for name, label in (
        ("teacher_kl", "KL to the teacher, nats per token"),
        ("reward/mean", "reward"),
        ("loss", "loss"),
    ):
        ends = curves.ends(name)
        if ends and not (name == "loss" and tiles):
            tiles.append(
                [label, format_number(ends[1]), f"{format_number(ends[0])} in the first steps"]
            )
    seconds = read_json_object(folder.summary).get("wall_seconds") or curves.sums.get("time/step")
    if isinstance(seconds, int | float):
        tiles.append(["time", format_clock(seconds), f"{curves.last_step:,} steps"])
    tokens = curves.sums.get("tokens/completion")
    if tokens:
        tiles.append(["tokens learned from", f"{tokens:,.0f}", ""])
    return tiles
