"""`rnow compare`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.comparing.folders import evaluate, keep_eval, make_run
from tests.report.runs import data_of

from rnow.cli.main import run_command_line
from rnow.errors import EXIT_BAD_INPUT

Run = Callable[..., tuple[int, str, str]]
PASSED = {"a": (0, 1, 0, 1, 2, 1, 0, 1), "b": (4, 3, 4, 4, 4, 3, 4, 4)}


@pytest.fixture
def rnow_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        run = make_run(
            tmp_path / "runs" / name,
            metrics={
                "teacher_kl": lambda step, rate=rate: 1e-4 / rate / step,
                "time/step": lambda _: 2.0,
            },
            config={"trainer": {"learning_rate": rate}},
        )
        evaluate(run, "after", 20, PASSED[name])
        keep_eval(run, 20, {"p": PASSED[name][0], "q": 4})

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command_line(["compare", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


def test_runs_side_by_side(rnow_: Run) -> None:
    code, output, errors = rnow_("a", "runs/b")
    assert code == 0, errors
    lines = [line.rstrip() for line in output.splitlines()]
    at = lines.index("teacher_kl")
    a, b = (line.split() for line in lines[at + 1 : at + 3])
    assert (a[0], *a[2:]) == ("a", "0.750", "0.051", "0.050", "(20)")
    assert (b[0], *b[2:]) == ("b", "0.075", "0.005", "0.005", "(20)")
    assert a[1][0] > b[1][0], "on one scale the larger one stands higher"
    assert any(line.split() == ["trainer.learning_rate", "0.0001", "0.001"] for line in lines)
    assert "after: pass@1" in output
    assert "- a" in output


def test_the_same_for_scripts(rnow_: Run) -> None:
    code, output, errors = rnow_("a", "b", "--json", "--metric", "time/*")
    assert code == 0, errors
    found = json.loads(output)
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    assert list(found["metrics"]) == ["time/step"]
    assert found["metrics"]["time/step"][0]["values"] == [2.0] * 20
    assert found["settings"] == {"trainer.learning_rate": [1e-4, 1e-3]}
    row = found["evaluations"]["after: pass@1"]
    assert row["runs"][1]["value"] == pytest.approx(0.9375)
    assert row["runs"][1]["low"] < 0.9375 < row["runs"][1]["high"]
    assert row["minus_first"][0]["low"] > 0
    assert sum(name.startswith("eval ") for name in found["evaluations"]) == 2


def test_a_page_is_written(rnow_: Run, tmp_path: Path) -> None:
    code, _, errors = rnow_("a", "b", "--html", "pages/both.html")
    assert code == 0, errors
    assert "written: pages/both.html" in errors
    data = data_of((tmp_path / "pages" / "both.html").read_bytes())
    assert [run["label"] for run in data["runs"]] == ["a", "b"]


def test_a_secret_of_the_project_is_not_shown(rnow_: Run, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SOME_KEY=hunter22\n")
    make_run(tmp_path / "runs" / "c", config={"description": "with hunter22"})
    code, output, _ = rnow_("a", "c", "--html", "page.html")
    assert code == 0
    assert "hunter22" not in output + (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "nothing to compare one run with"),
        (["a", "runs/a"], "nothing to compare one run with"),
        (["a", "d"], "there is no run 'd'"),
        (["a", "b", "--metric", "nothing/*"], "none of these runs has a metric that fits"),
        (["a", "b", "--html", "runs/a/metrics.jsonl/x/page.html"], "cannot write to the page"),
    ],
)
def test_what_is_refused(rnow_: Run, arguments: list[str], said: str) -> None:
    code, _, errors = rnow_(*arguments)
    assert code == EXIT_BAD_INPUT
    assert said in errors


def test_runs_without_a_step_are_refused(rnow_: Run, tmp_path: Path) -> None:
    for name in ("d", "e"):
        make_run(tmp_path / "runs" / name, steps=0)
    code, _, errors = rnow_("d", "e")
    assert code == EXIT_BAD_INPUT
    assert "these runs have no steps" in errors
