"""What a sandbox shows of this machine, and what it hides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rnow.errors import InputError
from rnow.usercode.visible import (
    check_project,
    hidden_in,
    import_path,
    outermost,
    python_folders,
    python_links,
)


def test_secrets_and_earlier_runs_are_hidden(tmp_path: Path) -> None:
    for name in (".env", ".env.local", "environment.py", "train.jsonl"):
        (tmp_path / name).touch()
    for name in ("runs", ".git", "data"):
        (tmp_path / name).mkdir()
    hidden = hidden_in([tmp_path], [tmp_path])
    assert hidden.files == (tmp_path / ".env", tmp_path / ".env.local")
    assert hidden.folders == (tmp_path / ".git", tmp_path / "runs")


def test_secrets_are_hidden_at_every_depth(tmp_path: Path) -> None:
    deep = tmp_path / "sub" / "more"
    deep.mkdir(parents=True)
    (tmp_path / "runs" / "old").mkdir(parents=True)
    for name in ("sub/.env.local", "sub/more/.netrc", "runs/old/.env", "sub/env.py"):
        (tmp_path / name).touch()
    hidden = hidden_in([tmp_path], [tmp_path])
    assert hidden.files == (tmp_path / "sub" / ".env.local", deep / ".netrc")


def test_hidden_under_every_path_that_leads_there(tmp_path: Path) -> None:
    project, link = tmp_path / "project", tmp_path / "link"
    project.mkdir()
    (project / ".env").touch()
    link.symlink_to(project)
    assert hidden_in([link], [link, tmp_path]).files == (link / ".env", project / ".env")


def test_what_a_linked_file_points_to_is_hidden(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "secrets.txt").touch()
    (tmp_path / "shared.env").touch()
    (project / ".env").symlink_to("secrets.txt")
    (project / ".env.shared").symlink_to("../shared.env")
    # The second points out of what is shown: inside, it leads nowhere.
    assert hidden_in([project], [project]).files == (project / "secrets.txt",)


def test_a_home_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "home" / "project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_project(project)
    for folder in (tmp_path / "home", tmp_path, Path("/")):
        with pytest.raises(InputError, match="would show all of"):
            check_project(folder)


def test_the_import_path_leaves_out_homes_and_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, home, project = (tmp_path / name for name in ("library", "home", "project"))
    for folder in (library, home, project):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sys, "path", ["", "here", str(library), str(home), str(project), "/none"])
    assert import_path(project) == [str(library)]


def test_python_can_be_found_inside() -> None:
    shown = outermost([*python_folders(), *python_links()])
    program = Path(sys.executable)
    for path in (program, program.resolve(), Path(sys.base_prefix)):
        assert any(path.is_relative_to(folder) for folder in shown)


def test_outermost() -> None:
    paths = [Path(text) for text in ("/a/b", "/a", "/a/b/c", "/ab", "/a")]
    assert outermost(paths) == [Path("/a"), Path("/ab")]
