"""What is said of a run that is well, and of one that is not."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report.runs import metrics_row

from rnow.report.curves import read_curves
from rnow.report.health import read_health


def verdicts(steps: int = 20, **changes: Any) -> dict[str, list[str]]:
    rows = [metrics_row(step, steps) for step in range(1, steps + 1)]
    for name, value in changes.items():
        for row in rows:
            row[name.replace("__", "/")] = value(row["step"]) if callable(value) else value
    found: dict[str, list[str]] = {"well": [], "look": []}
    for item in read_health(read_curves(rows)):
        found[item["verdict"]].append(item["text"])
    return found


def test_a_run_that_is_well() -> None:
    found = verdicts()
    assert found["look"] == []
    assert "The KL to the teacher fell from 0.932 to 0.122" in " ".join(found["well"])
    assert "Every step made an update." in found["well"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_kl": lambda step: 0.1 * step}, "KL to the teacher rose from"),
        ({"reward__mean": lambda step: 1.0 / step}, "reward fell"),
        ({"skipped_updates": lambda step: float(step == 3)}, "made no update"),
        ({"grad_norm": lambda step: None if step == 3 else 0.1}, "Not a finite number in some steps: grad_norm"),
        ({"rollouts__failed_fraction": 0.25}, "25.0% of the rollouts failed"),
        ({"completions__truncated_fraction": 0.5}, "rollout.max_tokens is too small"),
        ({"reward__failure_fraction": 0.1}, "10.0% of the rewards failed"),
        ({"tools__failure_fraction": 0.75}, "75.0% of the tool calls failed"),
        ({"clip_fraction": 0.5}, "clipped"),
        ({"sampler_trainer_kl": -0.5}, "Sampler and trainer disagree by -0.500"),
    ],
)  # fmt: skip
def test_a_run_that_is_not(changes: dict[str, Any], said: str) -> None:
    found = verdicts(**changes)
    assert any(said in text for text in found["look"]), found


def test_a_run_of_rows_is_followed_by_its_loss() -> None:
    rows = [{"step": step, "loss": 2.0 / step} for step in range(1, 11)]
    (course, *_) = read_health(read_curves(rows))
    assert course["text"].startswith("The loss fell from 2.000 to 0.200")


def test_nothing_is_said_of_nothing() -> None:
    assert read_health(read_curves([])) == []
