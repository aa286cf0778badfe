"""The evaluations of a run as a table, with intervals where the answers are kept, and a few of the answers themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from rnow.core.messages import get_response
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import read_evaluations
from rnow.report.curves import rounded
from rnow.report.text import MESSAGE, messages, safe, size_of
from rnow.training.intervals import (
    HOW,
    Interval,
    difference_interval,
    mean_interval,
    pass_at_k,
)

ORDER = ("before", "after", "teacher")
FIRST = ("pass@", "loss", "reward/mean", "teacher_kl")
LEFT_OUT = ("tokens/", "throughput/", "time/", "memory/")
SAME = 1e-6
"""How near the mean over the kept answers must be to the one that was recorded, for them to be of one evaluation."""

PROMPTS, PROMPT_BYTES = 40, 300_000
"""Held-out prompts that are shown, and what they may take."""

Row = Mapping[str, Any]


def evaluation_table(folder: RunFolder, success_reward: float) -> dict[str, object] | None:
    """The newest evaluation of each name, side by side, JSON-ready; None without any.

    Args:
        success_reward: of the config: an answer whose reward is at least this much counts as passed.
    """
    rows = read_evaluations(folder.evaluations)
    newest = {row["name"]: row for row in rows}
    names = [name for name in ORDER if name in newest] + [n for n in newest if n not in ORDER]
    if not names:
        return None
    passed = {
        name: passed_answers(
            kept_answers(folder.answers / f"{name}.jsonl", newest[name]["step"]), success_reward
        )
        for name in names
    }
    values = {
        name: {
            metric: value
            for metric, value in newest[name].items()
            if metric not in ("name", "step", "settings") and not metric.startswith(LEFT_OUT)
        }
        for name in names
    }
    rates = {
        name: {metric: pass_rates(metric, value, passed[name]) for metric, value in found.items()}
        for name, found in values.items()
    }
    metrics = sorted({metric for found in values.values() for metric in found}, key=_place)
    settings = newest.get("after", newest[names[-1]]).get("settings")
    return {
        "columns": [
            {
                "name": safe(name),
                "step": newest[name]["step"],
                "other": newest[name].get("settings", settings) != settings,
            }
            for name in names
        ],
        "rows": [
            {
                "metric": safe(metric),
                "cells": [
                    _cell(values[name].get(metric), rates[name].get(metric, {})) for name in names
                ],
                "difference": _difference(
                    *(rates.get(name, {}).get(metric, {}) for name in ("before", "after"))
                ),
            }
            for metric in metrics
        ],
        "how": HOW,
        "prompts": max(map(len, passed.values())),
    }


def evaluation_charts(folder: RunFolder) -> list[dict[str, object]]:
    """Of evaluations that were repeated during training, pass@k and ``teacher_kl`` over the steps."""
    rows: dict[str, list[Row]] = {}
    for row in read_evaluations(folder.evaluations):
        rows.setdefault(row["name"], []).append(row)
    charts = []
    for name, found in rows.items():
        steps = sorted({row["step"]: row for row in found}.items())
        if len(steps) < 2:
            continue
        for unit, begins in (("share", "pass@"), ("nats per token", "teacher_kl"), ("", "loss")):
            metrics = sorted({key for _, row in steps for key in row if key.startswith(begins)})
            series = [
                {"label": safe(key), "values": [row.get(key) for _, row in steps]}
                for key in metrics
            ]
            if series:
                charts.append(
                    {
                        "title": safe(f"Evaluation {name}: {begins.rstrip('@')}"),
                        "unit": unit,
                        "about": "",
                        "x": [step for step, _ in steps],
                        "series": series,
                    }
                )
    return charts


def success_reward(config: object) -> float:
    """``evaluation.success_reward`` of a config as plain data; its default where there is none."""
    evaluation = config.get("evaluation") if isinstance(config, dict) else None
    found = evaluation.get("success_reward") if isinstance(evaluation, dict) else None
    return float(found) if isinstance(found, int | float) else 1.0


def kept_answers(path: Path, step: int) -> list[Row]:
    """The answers of one evaluation after so many steps, as ``disk.answers`` writes them; none where the file has those of another
    step, or is not whole."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in rows if row.get("step") == step] if all(map(_sound, rows)) else []


def _sound(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("prompt_id"), str):
        return False
    said = [row.get("messages") or [], row.get("answer") or []]
    judged = [row.get("rewards") or {}, row.get("reward_errors") or {}]
    return all(
        isinstance(part, list) and all(isinstance(message, dict) for message in part)
        for part in said
    ) and all(isinstance(part, dict) for part in judged)


def passed_answers(rows: Sequence[Row], success: float) -> dict[str, tuple[int, int]]:
    """Prompt id -> how many of its kept answers were judged, and how many of those passed: ``count_passed`` of what was kept.

    Args:
        success: an answer whose reward is at least this much counts as passed.
    """
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        reward = row.get("reward")
        if isinstance(reward, int | float):
            judged, right = found.get(row["prompt_id"], (0, 0))
            found[row["prompt_id"]] = (judged + 1, right + (_worked(row) and reward >= success))
    return found


def _worked(row: Row) -> bool:
    """``RewardResult.worked``."""
    errors = row.get("reward_errors") or {}
    return not errors or not (row.get("rewards") or {}).keys() <= errors.keys()


def pass_rates(
    metric: str, value: float | None, passed: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """Prompt id -> its pass@k; empty of another metric, and where the kept answers do not say, or do not bear ``value`` out.

    Args:
        value: what was recorded, the mean over the prompts.
        passed: see ``passed_answers``.
    """
    k = metric.removeprefix("pass@")
    if not metric.startswith("pass@") or not k.isdecimal() or int(k) < 1:
        return {}
    if value is None or not passed or any(judged < int(k) for judged, _ in passed.values()):
        return {}
    found = {prompt: pass_at_k(*counts, int(k)) for prompt, counts in passed.items()}
    return found if abs(fmean(found.values()) - value) < SAME else {}


def _cell(value: object, rates: Mapping[str, float]) -> dict[str, float] | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return _plain(mean_interval([*rates.values()])) if rates else {"mean": rounded(value)}


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> object:
    same = before and before.keys() == after.keys()
    return _plain(difference_interval(before, after)) if same else None


def _plain(interval: Interval) -> dict[str, float]:
    return {name: rounded(value) for name, value in asdict(interval).items()}


def _place(metric: str) -> tuple[int, str]:
    known = [at for at, begin in enumerate(FIRST) if metric.startswith(begin)]
    return (known[0] if known else len(FIRST), metric)


def held_out_answers(folder: RunFolder) -> list[dict[str, object]]:
    """What was answered first to held-out prompts, before training, after it and by the teacher; those whose answer changed
    come first."""
    steps = {row["name"]: row["step"] for row in read_evaluations(folder.evaluations)}
    given = {
        name: _first_answers(folder.answers / f"{name}.jsonl", steps[name])
        for name in ORDER
        if name in steps
    }
    prompts = {prompt: row for found in reversed(given.values()) for prompt, row in found.items()}
    before, after = given.get("before", {}), given.get("after", {})

    def changed(prompt: str) -> bool:
        return (
            prompt in before
            and prompt in after
            and before[prompt]["answer"] != after[prompt]["answer"]
        )

    shown: list[dict[str, object]] = []
    room = PROMPT_BYTES
    for prompt in islice(sorted(prompts, key=changed, reverse=True), PROMPTS):
        entry = {
            "id": safe(prompt),
            "messages": prompts[prompt]["messages"],
            "answers": {
                name: found[prompt]["answer"] for name, found in given.items() if prompt in found
            },
        }
        room -= size_of(entry)
        if room < 0:
            break
        shown.append(entry)
    return shown


def _first_answers(path: Path, step: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in kept_answers(path, step):
        if row["prompt_id"] in found:
            continue
        answer: Sequence[Any] = row.get("answer") or ()
        failed = row.get("status") == "failed"
        text = f"(failed: {row.get('error')})" if failed else get_response(answer) or "(nothing)"
        found[row["prompt_id"]] = {
            "messages": messages(row.get("messages") or ()),
            "answer": {"text": safe(text, MESSAGE), "reward": row.get("reward")},
        }
    return found
