"""Chat templates that print the date: it is that of the run, not of the day it is continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from tests.setup.projects import Project

from rnow.plan import rendered
from rnow.plan.prepare import prepare
from rnow.setup.build import run


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Project:
    found = Project(tmp_path, tiny_model_dir, rewards=False)
    for name in ("student", "teacher"):
        folder = Path(shutil.copytree(getattr(found, name), tmp_path / name))
        template = folder / "chat_template.jinja"
        dated = "{{- strftime_now('%d %b %Y') + '\\n' }}" + template.read_text(encoding="utf-8")
        template.write_text(dated, encoding="utf-8")
        setattr(found, name, folder)
    return found


def set_clock(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    monkeypatch.setattr(rendered, "local_time", lambda: datetime(2024, 7, day, 23, 5))  # noqa: DTZ001


def test_the_date_is_kept(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = project.config(trainer={"max_steps": 1})
    set_clock(monkeypatch, 26)
    run(config, folder=project.folder)
    facts = json.loads((project.folder / "runs" / "tiny" / "run.json").read_text("utf-8"))
    assert facts["template_date"] == "2024-07-26T23:05:00"

    set_clock(monkeypatch, 27)

    def prompt(*, training: bool = True, fresh: bool = False) -> str:
        found = prepare(config, project.folder, weights=True, training=training, fresh=fresh)
        ids = next(iter(found.rendered.prompt_token_ids.values()))
        return found.rendered.tokenizer.decode(list(ids))

    assert prompt().startswith("26 Jul 2024\n")
    assert prompt(training=False).startswith("26 Jul 2024\n")  # rnow test
    assert prompt(fresh=True).startswith("27 Jul 2024\n")


def test_a_template_without_a_date_leaves_none(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    project = Project(tmp_path, tiny_model_dir, rewards=False)
    found = prepare(project.config(), project.folder, weights=True)
    assert found.rendered.template_date is None
