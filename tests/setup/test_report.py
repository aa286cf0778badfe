"""The page of a run is written by the run, or left out where its config says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tests.report.runs import data_of
from tests.setup.projects import Project, Watcher

from rnow.setup.build import run


def test_a_run_writes_its_page_unless_it_is_switched_off(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    torch.set_num_threads(1)
    project = Project(tmp_path / "project", tiny_model_dir)
    page = project.run_dir / "report.html"

    def lines_of(steps: int, *, report: bool) -> list[str]:
        watcher = Watcher()
        config = project.config(report=report, trainer={"max_steps": steps})
        run(config, folder=project.folder, display=watcher)
        return [line for line in watcher.lines if line.startswith("report: ")]

    assert lines_of(1, report=False) == []
    assert not page.exists()
    assert lines_of(2, report=True) == [f"report: {page.resolve()}"]
    data = data_of(page.read_bytes())
    assert data["state"] == "finished after 2 steps"
    assert data["steps"] == [1, 2], "the step before is in it too"
    assert {rollout["s"] for rollout in data["rollouts"]} == {1, 2}
