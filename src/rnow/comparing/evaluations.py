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
from rnow.report.evaluation import kept_answers, pass_rates, passed_answers, success_reward
from rnow.training.intervals import Interval, difference_interval, mean_interval, pass_at_k

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
    success = success_reward(read_json_object(folder.facts).get("config"))
    found: dict[str, Measured] = {}
    newest = {row["name"]: row for row in read_evaluations(folder.evaluations)}
    order = {name: place for place, name in enumerate(_FIRST)}
    for name in sorted(newest, key=lambda name: order.get(name, len(order))):
        row = newest[name]
        answers = kept_answers(folder.answers / f"{name}.jsonl", row["step"])
        found |= {f"{name}: {metric}": one for metric, one in _of_row(row, answers, success)}
    return found | _read_kept(folder.path / EVALS)


def difference(first: Measured, other: Measured) -> Interval | None:
    """``other`` - ``first``, prompt by prompt; None where they are not of the same prompts."""
    same = first.prompts == other.prompts and first.by_prompt.keys() == other.by_prompt.keys()
    known = first.prompts and first.by_prompt
    return difference_interval(first.by_prompt, other.by_prompt) if same and known else None


def _of_row(
    row: Row, answers: Sequence[Mapping[str, Any]], success: float
) -> Iterator[tuple[str, Measured]]:
    """The numbers of one line of evaluations.jsonl; pass@k by prompt too, where the answers are kept."""
    passed = passed_answers(answers, success)
    asked = _hash_of({answer["prompt_id"]: answer.get("messages") for answer in answers})
    for metric, value in row.items():
        if not isinstance(value, int | float):
            continue
        if metric.startswith("pass@"):
            rates = pass_rates(metric, value, passed)
            yield metric, Measured(value=value, step=row["step"], by_prompt=rates, prompts=asked)
        elif metric in _HEADLINE:
            yield metric, Measured(value=value, step=row["step"])


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
