"""The run folder: its name, its lock, and a folder that cannot be written to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rnow.disk.folder import RunFolder, choose_run_folder
from rnow.errors import EXIT_BAD_INPUT, InputError

HOLD = """
import sys
from pathlib import Path
from rnow.disk.folder import RunFolder

with RunFolder(Path(sys.argv[1])).lock():
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse", "reverse"),
        ("my run: v2!", "my-run-v2"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "run"),
        ("", "run"),
        ("ü", "run"),
        ("-x", "x"),
        (".hidden", "hidden"),
        ("a/b\\c", "a-b-c"),
    ],
)
def test_names_stay_inside_the_output_folder(tmp_path: Path, name: str, expected: str) -> None:
    folder = choose_run_folder(tmp_path, name, fresh=False).path
    assert folder == tmp_path / expected


def test_a_very_long_name_still_makes_a_folder(tmp_path: Path) -> None:
    folder = choose_run_folder(tmp_path, "long-" * 100, fresh=True)
    folder.make()
    assert folder.path.is_dir()
    again = choose_run_folder(tmp_path, "long-" * 100, fresh=True)
    assert again.path != folder.path


def test_fresh_takes_the_first_free_number(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = choose_run_folder(tmp_path, "run", fresh=True)
        folder.make()
        names.append(folder.path.name)
    assert names == ["run", "run-2", "run-3"]
    assert choose_run_folder(tmp_path, "run", fresh=False).path.name == "run"


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another rnow process") as caught, folder.lock():
            pass
        assert caught.value.exit_code == EXIT_BAD_INPUT
        assert "--fresh" in str(caught.value.fix)
        holder.kill()
        holder.wait(timeout=20)
        with folder.lock():
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_is_let_go_of_after_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError), folder.lock():
        raise ValueError
    with folder.lock():
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="cannot write to the run folder") as caught:
        RunFolder(tmp_path / "runs" / "first").make()
    assert "output_dir" in str(caught.value.fix)


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only folders: the lock's file is the first thing to be written into an old run."""
    from filelock import FileLock

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(InputError, match="Permission denied"), RunFolder(tmp_path).lock():
        pass


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "first").make()
    assert list((tmp_path / "runs" / "first").iterdir()) == []
