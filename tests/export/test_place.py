"""Exports appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rnow.errors import InputError, TemporaryError
from rnow.export import place
from rnow.export.place import check_room, remove_leftovers, scratch, size_of, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str, *, force: bool = False, folder: bool = True) -> None:
    with written_aside(target, force=force) as aside:
        if folder:
            aside.mkdir()
        (aside / "file" if folder else aside).write_text(text)
        assert target.exists() == force, "nothing has the name before it is whole"


@pytest.mark.parametrize("folder", [True, False])
def test_it_has_its_name_when_it_is_whole(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "new" / "made"
    write(target, "one", folder=folder)
    with pytest.raises(InputError, match="nothing is overwritten"):
        write(target, "two", folder=folder)
    write(target, "three", force=True, folder=folder)
    assert (target / "file" if folder else target).read_text() == "three"
    assert names(target.parent) == ["made"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_what_is_interrupted_leaves_nothing_and_what_was_there(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "made"
    write(target, "old")

    def begin_and_fail() -> None:
        with written_aside(target, force=True) as aside:
            aside.mkdir()
            (aside / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        begin_and_fail()
    assert names(tmp_path) == ["made"]
    assert (target / "file").read_text() == "old"


def test_a_full_disk(tmp_path: Path) -> None:
    def fill() -> None:
        with scratch(tmp_path / "a") as aside:
            aside.write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TemporaryError, match="the disk is full"):
        fill()
    assert names(tmp_path) == []


def test_what_a_killed_export_left(tmp_path: Path) -> None:
    """Of those that live, nothing is touched; what was being replaced comes back."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".tmp-merged-{ended.pid}").mkdir()
    (tmp_path / f".tmp-merged-{os.getppid()}").mkdir()
    (tmp_path / f".old-adapter-{ended.pid}").write_text("kept")
    (tmp_path / ".tmp-notes").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [f".tmp-merged-{os.getppid()}", ".tmp-notes", "adapter"]
    (tmp_path / f".old-adapter-{ended.pid}").write_text("older")
    remove_leftovers(tmp_path)
    assert (tmp_path / "adapter").read_text() == "kept"


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check_room(tmp_path / "not" / "there", 900)
    with pytest.raises(InputError, match="are free") as caught:
        check_room(tmp_path, 1000)
    assert "-o" in (caught.value.fix or "")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no folder"):
        check_room(tmp_path / "file", 1)
    assert size_of(tmp_path) == 0
