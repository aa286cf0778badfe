"""`rnow eval` and `rnow serve`: what the command line means, and the table."""

from __future__ import annotations

import io
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rnow.cli.eval_view import eval_view
from rnow.cli.evaluate import parse_ks, parse_temperatures
from rnow.cli.main import run_command_line
from rnow.errors import InputError
from rnow.setup.eval_report import EvalReport, Evaluated
from rnow.setup.subjects import Subject

CONFIG = """\
dataset_type: distill
model:
  path: student
teacher:
  path: teacher
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(name: str, passed: list[int], *, fresh: bool = True, **metrics: float) -> Evaluated:
    sampling = {
        "temperature": 0.6,
        "samples": 4,
        "pass_at": [1, 4],
        "passed": {f"dataset_0/{index}": count for index, count in enumerate(passed)},
        "metrics": {"completions/mean_length": 12.5, **metrics},
    }
    return Evaluated(
        subject=Subject(name=name, kind="student", label="student", place=Path("evals")),
        kept=Path("evals") / f"{name}-1f0c2b7a.json",
        fresh=fresh,
        values={"samplings": [sampling]},
    )


REPORT = EvalReport(
    rows=[row("student", [0, 1, 2, 0]), row("[run]", [2, 4, 4, 3], fresh=False)],
    prompts="4 held-out prompts",
    count=4,
)


class Setup:
    """Stands for rnow.setup.evaluate and rnow.setup.serve; records how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def evaluate(self, config: Any, subjects: Any, **options: Any) -> EvalReport:
        options.pop("console").print("measuring")
        self.calls.append((config, [*subjects], options))
        return REPORT

    def serve(self, config: Any, trained: Any, **options: Any) -> None:
        options.pop("stage")("starting vLLM")
        options.pop("warn")("of an unknown base")
        options.pop("ready")("it")
        self.calls.append((config, trained, options))


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    from rnow.setup import evaluate, serve, subjects

    fake = Setup()
    monkeypatch.setattr(evaluate, "evaluate", fake.evaluate)
    monkeypatch.setattr(serve, "serve", fake.serve)
    monkeypatch.setattr(serve, "usage_lines", lambda served: [f"serving {served}"])

    def found(run: str, **options: Any) -> Any:
        adapter = types.SimpleNamespace(base="some/base")
        return types.SimpleNamespace(adapter=adapter, asked=(run, options))

    monkeypatch.setattr(subjects, "find_trained", found)
    return fake


def test_subjects_settings_and_options(
    project: Path, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_command_line(
        ["eval", "student", "rollout.max_tokens=9", "my=run/x", "tiny@4", "--samples", "16", "--seed", "3",
         "--pass", "8,1", "-t", "0.3,0.9", "--again", "--prompts", "test.jsonl"]
    )  # fmt: skip
    output, error = capsys.readouterr()
    assert code == 2, "my=run/x is no setting"
    assert "my" in error
    code = run_command_line(
        ["eval", "student", "rollout.max_tokens=9", "./my=run", "tiny@4", "--samples", "16", "--seed", "3",
         "--pass", "8,1", "-t", "0.3,0.9", "--again", "--prompts", "test.jsonl"]
    )  # fmt: skip
    output, error = capsys.readouterr()
    assert code == 0, error
    ((config, subjects, options),) = setup.calls
    assert config.rollout.max_tokens == 9
    assert subjects == ["student", "./my=run", "tiny@4"]
    asked = options["asked"]
    assert [*asked.temperatures.items()] == [(1, 0.9), (8, 0.3)], "as they were written"
    assert (asked.samples, asked.seed, asked.again) == (16, 3, True)
    assert asked.prompts == Path("test.jsonl")
    assert "measuring" in output
    assert "[run] - student" in output


def test_without_options_the_temperatures_are_the_hosted_ones(project: Path, setup: Setup) -> None:
    assert run_command_line(["eval", "-s", "4"]) == 0
    ((_, subjects, options),) = setup.calls
    assert (subjects, options["step"]) == ([], 4)
    assert options["asked"].temperatures == {1: 0.2, 4: 0.6, 8: 0.8}
    assert options["asked"].prompts is None


@pytest.mark.parametrize(
    ("flags", "ks"),
    [
        ([], [1, 4, 8]),
        (["--pass1"], [1]),
        (["--pass8"], [1, 8]),
        (["--pass4", "--pass8", "--no-pass1"], [4, 8]),
        (["--pass1", "--no-pass4"], [1]),
    ],
)
def test_the_hosted_flags(project: Path, setup: Setup, flags: list[str], ks: list[int]) -> None:
    hosted = ["eval", "-m", "other", "-n", "50", "--project-id", "abc", *flags]
    assert run_command_line(hosted) == 0
    ((config, subjects, options),) = setup.calls
    assert (config.model.path, subjects) == ("other", ["student"])
    assert (options["asked"].most, options["asked"].samples) == (50, None)
    assert [*options["asked"].temperatures] == ks


def test_hosted_flags_that_leave_nothing(
    project: Path, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["eval", "--no-pass1"]) == 2
    assert "--pass 1,4,8" in capsys.readouterr().err
    assert run_command_line(["eval", "--eval-id", "abc"]) == 2
    assert "--prompts FILE" in capsys.readouterr().err


def test_json_is_all_of_standard_output(
    project: Path, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["eval", "--json"]) == 0
    output, error = capsys.readouterr()
    found = json.loads(output)
    assert [subject["name"] for subject in found["subjects"]] == ["student", "[run]"]
    assert found["subjects"][0]["pass"]["pass@1"]["mean"] == pytest.approx(3 / 16)
    assert found["differences"][0]["pass"]["pass@4"]["mean"] == pytest.approx(0.5)
    assert "measuring" in error


def shown(report: EvalReport, width: int = 160) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for part in eval_view(report, console):
        console.print(part, highlight=False)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    return [line.rstrip() for line in lines if line.strip()]


def test_the_table() -> None:
    head, _, student, trained, difference, how, read, *kept = shown(REPORT)
    assert head.split() == [
        "4",
        "held-out",
        "prompts",
        "pass@1",
        "at",
        "0.6",
        "pass@4",
        "at",
        "0.6",
        "tokens",
    ]
    assert student.split()[:2] == ["student", "0.188"]
    assert trained.split()[:2] == ["[run]", "0.812"]
    assert trained.endswith("12.5")
    assert difference.startswith("[run] - student")
    assert "+0.625 [+" in difference
    assert "bootstrap over prompts" in how
    assert read == "read back: [run]; --again measures anew"
    assert kept == [
        "student: evals/student-1f0c2b7a.json", "[run]: evals/[run]-1f0c2b7a.json",
    ]  # fmt: skip


def test_a_narrow_terminal_cuts_no_number_and_no_name() -> None:
    wide, narrow = shown(REPORT), shown(REPORT, 70)
    head, _, *lines = narrow
    assert head.split() == ["4", "held-out", "prompts", "tokens"]
    rows = [line.split("  ") for line in lines[:6]]
    names = [row[0].strip() for row in rows]
    assert names == ["student", "", "[run]", "", "[run] - student", ""]
    assert all(f"pass@{k} at 0.6" in line for line, k in zip(lines, (1, 4) * 3, strict=False))
    numbers = re.compile(r"[+-]?\d\.\d{3} \[.*?\]")
    assert numbers.findall("\n".join(lines)) == numbers.findall("\n".join(wide))
    assert len(numbers.findall("\n".join(lines))) == 6


def test_a_file_s_name_is_no_markup() -> None:
    head, *_ = shown(EvalReport(rows=REPORT.rows, prompts="4 prompts of [/b]\x1b[2J", count=4))
    assert "[/b]\\x1b[2J" in head


def test_answers_that_failed_are_told_of_whenever_their_numbers_are_shown() -> None:
    half = {"rollouts/failed_fraction": 0.5, "reward/failure_fraction": 0.5}
    rows = [row("student", [0, 1]), row("[run]", [2, 4], fresh=False, **half)]
    report = EvalReport(rows=rows, prompts="2 held-out prompts", count=2)
    (told,) = [line for line in shown(report) if "failed" in line]
    assert told.startswith("75.0% of the answers of [run] failed")
    plain = json.loads(json.dumps(report.to_dict()))
    assert [subject["failed"] for subject in plain["subjects"]] == [0.0, 0.75]


@pytest.mark.parametrize(
    "text", ["", "0", "1,", "a", "1.5", "4096", "-1", "٣", pytest.param("1" * 5000, id="long")]
)
def test_what_is_no_k(text: str) -> None:
    with pytest.raises(InputError, match="--pass"):
        parse_ks(text)


@pytest.mark.parametrize(
    "text", ["", "x", "0.2,", "-1", "nan", "inf", "0.1,0.2", pytest.param("9" * 5000, id="long")]
)
def test_what_is_no_temperature(text: str) -> None:
    with pytest.raises(InputError, match="-t"):
        parse_temperatures(text, (1, 4, 8))


def test_temperatures() -> None:
    assert parse_ks("8, 1,1") == (8, 1)
    assert parse_temperatures("0.7", (1, 8)) == {1: 0.7, 8: 0.7}
    assert parse_temperatures("0,1.5", (8, 1)) == {8: 0.0, 1: 1.5}


def test_serve_in_a_project_and_outside_of_one(
    project: Path, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", "tiny", "sampler.max_num_seqs=7", "--step", "4", "--port", "9000"]
    assert run_command_line(arguments) == 0
    output, error = capsys.readouterr()
    assert output == "serving it\n"
    assert "starting vLLM ..." in error
    assert "warning: of an unknown base" in error
    (project / "config.yml").unlink()
    assert run_command_line(["serve", "adapter", "sampler.max_num_seqs=5"]) == 0
    (config, trained, options), (bare, elsewhere, others) = setup.calls
    assert trained.asked == (
        "tiny", {"folder": Path(), "output_dir": "runs", "step": 4, "command": "serve"},
    )  # fmt: skip
    assert (config.model.path, config.sampler.max_num_seqs) == ("student", 7)
    assert options == {"folder": Path(), "host": "127.0.0.1", "port": 9000}
    assert elsewhere.asked[0] == "adapter"
    assert (bare.model.path, bare.sampler.max_num_seqs) == ("some/base", 5)
    assert others["port"] is None
