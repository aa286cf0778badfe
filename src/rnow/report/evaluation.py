"""The evaluations of a run as a table, with intervals where the answers are kept, and a few of the answers themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
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
        name: _passed(folder.answers / f"{name}.jsonl", newest[name]["step"], success_reward)
        for name in names
    }
    values = {
        name: {
            metric: _interval(metric, value, passed[name])
            for metric, value in newest[name].items()
            if metric not in ("name", "step", "settings") and not metric.startswith(LEFT_OUT)
        }
        for name in names
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
                "cells": [values[name].get(metric) for name in names],
                "difference": _difference(metric, passed)
                if _has_interval(values, metric)
                else None,
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


def _passed(path: Path, step: int, success: float) -> dict[str, tuple[int, int]]:
    """Prompt id -> how many of its kept answers were judged, and how many of those passed: ``count_passed`` of what was kept."""
    found: dict[str, tuple[int, int]] = {}
    for row in _answers(path, step):
        reward = row.get("reward")
        if isinstance(reward, int | float):
            judged, right = found.get(row["prompt_id"], (0, 0))
            found[row["prompt_id"]] = (judged + 1, right + (_worked(row) and reward >= success))
    return found


def _worked(row: Row) -> bool:
    """``RewardResult.worked``."""
    errors = row.get("reward_errors") or {}
    return not errors or not (row.get("rewards") or {}).keys() <= errors.keys()


def _answers(path: Path, step: int) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                row = json.loads(line)
                if row["step"] == step and isinstance(row["prompt_id"], str):
                    yield row
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # not kept by this version, or cut


def _each(metric: str, passed: Mapping[str, tuple[int, int]]) -> dict[str, float] | None:
    """Prompt id -> pass@k; None of another metric, or where the answers do not say."""
    k = metric.removeprefix("pass@")
    if not metric.startswith("pass@") or not k.isdecimal() or not passed:
        return None
    if any(judged < int(k) for judged, _ in passed.values()):
        return None
    return {prompt: pass_at_k(*counts, int(k)) for prompt, counts in passed.items()}


def _interval(
    metric: str, value: float | None, passed: Mapping[str, tuple[int, int]]
) -> dict[str, float] | None:
    if value is None or not math.isfinite(value):
        return None
    each = _each(metric, passed)
    if each is None:
        return {"mean": rounded(value)}
    found = mean_interval([*each.values()])
    return _plain(found) if abs(found.mean - value) < SAME else {"mean": rounded(value)}


def _difference(metric: str, passed: Mapping[str, Mapping[str, tuple[int, int]]]) -> object:
    before, after = (_each(metric, passed.get(name, {})) for name in ("before", "after"))
    if before is None or after is None or before.keys() != after.keys():
        return None
    return _plain(difference_interval(before, after))


def _has_interval(values: Mapping[str, Mapping[str, Row | None]], metric: str) -> bool:
    found = [values.get(name, {}).get(metric) for name in ("before", "after")]
    return all(cell is not None and "low" in cell for cell in found)


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
    for row in _answers(path, step):
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
