"""What the table of several students says of each."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from rnow.cli.several import outcome_table, result_line
from rnow.errors import ModelError
from rnow.setup.facts import RunSummary
from rnow.setup.several import Outcome

COURSE = {"first": 2.0, "last": 0.5, "averaged_steps": 1}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"evaluation": {"before": {"pass@1": 0.25}, "after": {"pass@1": 0.75}}},
            "pass@1 0.250 -> 0.750",
        ),
        ({"teacher_kl": COURSE, "evaluation": {}}, "teacher_kl 2.000 -> 0.500"),
        (
            {"teacher_kl": {"first": None, "last": None}, "loss": COURSE, "evaluation": {}},
            "loss 2.000 -> 0.500",
        ),
        ({"evaluation": {"before": {"loss": 2.0}, "after": {"loss": 0.5}}}, "loss 2.000 -> 0.500"),
        ({}, "-"),
    ],
)
def test_how_far_each_came(values: dict[str, Any], said: str) -> None:
    one = Outcome(student="a", name="sweep-a", summary=RunSummary(values={"steps": 3, **values}))
    row = shown([one]).splitlines()[2]
    assert row.split() == ["a", "sweep-a", "3", *said.split(), "trained"]


def test_the_line_of_a_result() -> None:
    values = {
        "run_dir": "/home/ann/runs/tiny",
        "adapter": "/home/ann/runs/tiny/adapter",
        "steps": 3,
    }
    assert result_line(values) == "tiny: 3 steps; /home/ann/runs/tiny/adapter"
    measured = values | {"teacher_kl": COURSE}
    assert result_line(measured) == (
        "tiny: 3 steps, teacher_kl 2.000 -> 0.500; /home/ann/runs/tiny/adapter"
    )


def test_one_that_failed() -> None:
    failed = Outcome(student="b", name="sweep-b", error=ModelError("there is no folder 'b'"))
    assert "failed: there is no folder 'b'" in shown([failed])


def shown(outcomes: list[Outcome]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(outcome_table(outcomes))
    return capture.get()
