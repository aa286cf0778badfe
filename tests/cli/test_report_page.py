"""`rnow report`: of which run, where to, and what is said when there is nothing."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from tests.report.runs import data_of, make_run

from rnow.cli.main import run_command_line
from rnow.errors import EXIT_BAD_INPUT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return make_run(tmp_path / "runs" / "tiny").path


def test_a_run_by_its_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["report", "tiny"]) == 0
    assert capsys.readouterr().out.strip() == "runs/tiny/report.html"
    assert data_of((run / "report.html").read_bytes())["name"] == "tiny"


def test_another_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["report", "runs/tiny", "-o", "page.html"]) == 0
    assert capsys.readouterr().out.strip() == "page.html"
    assert Path("page.html").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("there", [True, False])
def test_it_is_opened(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    opened: list[str] = []

    def browser(address: str) -> bool:
        opened.append(address)
        return there

    monkeypatch.setattr(webbrowser, "open", browser)
    assert run_command_line(["report", "tiny", "--open"]) == 0
    address = (run / "report.html").resolve().as_uri()
    assert opened == [address]
    assert (address in capsys.readouterr().err) is not there


def test_no_such_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["report", "tinny"]) == EXIT_BAD_INPUT
    assert "rnow report tiny" in capsys.readouterr().err


def test_a_run_that_has_recorded_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = run.parent / "new"
    new.mkdir()
    (new / "process.json").write_text("{}")
    assert run_command_line(["report", "new"]) == EXIT_BAD_INPUT
    assert "recorded nothing yet" in capsys.readouterr().err


def test_a_place_that_takes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["report", "tiny", "-o", "no/such/page.html"]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "--output PATH" in error
