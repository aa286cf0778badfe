"""The evaluations of a run, with as much as its folder keeps of single prompts: that is what intervals and differences need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnow.disk.evals import EVALS
from rnow.disk.files import read_json_object
from rnow.disk.folder import RunFolder
from rnow.disk.sinks import Row, read_evaluations
from rnow.training.intervals import Interval, difference_interval, mean_interval, pass_at_k
from rnow.types import RewardResult

_HEADLINE = ("teacher_kl", "loss", "reward/mean")
"""Metrics of an evaluation that are compared, beside every pass@k."""

_FIRST = ("before", "after", "teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One number of an evaluation.

    Attributes:
        step: after how many steps.
        by_prompt: prompt -> its own value, in [0, 1]; empty where that was not kept.
        prompts: a hash of what was asked; equal ones can be compared prompt by prompt.
    """

    value: float
    step: int
    by_prompt: Mapping[str, float] = field(default_factory=dict)
    prompts: str = ""

    @property
    def interval(self) -> Interval | None:
        """Of the mean over prompts."""
        return mean_interval([*self.by_prompt.values()]) if self.by_prompt else None


def read_measured(folder: RunFolder) -> dict[str, Measured]:
    """What is known of a run: ``after: pass@1`` and the like, then what ``rnow eval`` kept, ``eval 1f0c2b7a: pass@4 at 0.6``; of
    each the newest."""
    success = _success_reward(folder)
    found: dict[str, Measured] = {}
    newest = {row["name"]: row for row in read_evaluations(folder.evaluations)}
    order = {name: place for place, name in enumerate(_FIRST)}
    for name in sorted(newest, key=lambda name: order.get(name, len(order))):
        row = newest[name]
        answers = _read_answers(folder.answers / f"{name}.jsonl", row["step"])
        found |= {f"{name}: {metric}": one for metric, one in _of_row(row, answers, success)}
    return found | _read_kept(folder.path / EVALS)


def difference(first: Measured, other: Measured) -> Interval | None:
    """``other`` - ``first``, prompt by prompt; None where they are not of the same prompts."""
    same = first.prompts == other.prompts and first.by_prompt.keys() == other.by_prompt.keys()
    return difference_interval(first.by_prompt, other.by_prompt) if same and first.prompts else None


def _success_reward(folder: RunFolder) -> float:
    config = read_json_object(folder.facts).get("config")
    section = config.get("evaluation") if isinstance(config, dict) else None
    value = section.get("success_reward") if isinstance(section, dict) else None
    return float(value) if isinstance(value, int | float) else 1.0


def _of_row(
    row: Row, answers: Sequence[Mapping[str, Any]], success: float
) -> Iterator[tuple[str, Measured]]:
    """The numbers of one line of evaluations.jsonl; pass@k from the answers, where they are kept."""
    counts: dict[str, list[bool]] = {}
    for answer in answers:
        if answer["reward"] is not None:
            right = _worked(answer) and answer["reward"] >= success
            counts.setdefault(answer["prompt_id"], []).append(right)
    asked = _hash_of({answer["prompt_id"]: answer["messages"] for answer in answers})
    for metric, value in row.items():
        if not isinstance(value, int | float) or metric == "step":
            continue
        number = metric.removeprefix("pass@")
        if number == metric:
            if metric in _HEADLINE:
                yield metric, Measured(value=value, step=row["step"])
            continue
        k = int(number) if number.isdecimal() else 0
        enough = bool(counts) and 0 < k <= min(map(len, counts.values()))
        by_prompt = (
            {prompt: pass_at_k(len(own), sum(own), k) for prompt, own in counts.items()}
            if enough
            else {}
        )
        yield metric, Measured(value=value, step=row["step"], by_prompt=by_prompt, prompts=asked)


def _worked(answer: Mapping[str, Any]) -> bool:
    """As for whoever counted them when they were measured (``training.evaluations.count_passed``)."""
    reward = RewardResult(total=0.0, breakdown=answer["rewards"], errors=answer["reward_errors"])
    return reward.worked


def _read_answers(path: Path, step: int) -> list[Mapping[str, Any]]:
    """The answers of one evaluation; none where those of another step are there, or a file that is not whole."""
    try:
        lines = filter(None, path.read_text(encoding="utf-8").split("\n"))
        rows = [json.loads(line) for line in lines]
        wanted = ("step", "prompt_id", "messages", "reward", "rewards", "reward_errors")
        kept = [{name: row[name] for name in wanted} for row in rows]
        whole = all(
            isinstance(row["prompt_id"], str)
            and isinstance(row["reward"], int | float | None)
            and isinstance(row["rewards"], dict)
            and isinstance(row["reward_errors"], dict)
            for row in kept
        )
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [row for row in kept if row["step"] == step] if whole else []


def _read_kept(folder: Path) -> dict[str, Measured]:
    """What ``rnow eval`` measured of a run. Those of one way of measuring have one name, whoever was measured."""
    found: dict[str, Measured] = {}
    for path in sorted(folder.glob("step-*.json")):
        kept = read_json_object(path)
        try:
            how = {name: kept["measured"][name] for name in ("prompts", "samplings", "seed")}
            step, label = int(path.name.split("-")[1]), _hash_of(how)[:8]
            for sampling in kept["samplings"]:
                for k in sampling["pass_at"]:
                    own = {
                        prompt: pass_at_k(sampling["samples"], passed, k)
                        for prompt, passed in sampling["passed"].items()
                    }
                    name = f"eval {label}: pass@{k} at {sampling['temperature']:g}"
                    value = sum(own.values()) / len(own)
                    found[name] = Measured(value=value, step=step, by_prompt=own, prompts=label)
        except (LookupError, TypeError, ValueError, ZeroDivisionError, AttributeError):
            continue
    return found


def _hash_of(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if value else ""
