"""The run folder: its name, its lock, and a folder that cannot be written to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rnow.disk.folder import RunFolder, choose_run_folder, folder_name, saved_steps
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
        ("lr-2e-5", "lr-2e-5"),
        ("a--b", "a--b"),
        ("schöne-Größe", "schöne-Größe"),
        ("実験.1", "実験.1"),
        ("हिन्दी", "हिन्दी"),
        ("my run: v2!", "my-run-v2-"),
        ("../../etc/passwd", "etc-passwd-"),
        ("..", "run-"),
        ("", "run-"),
        ("🙂", "run-"),
        ("-x", "x-"),
        (".hidden", "hidden-"),
        ("a/b\\c", "a-b-c-"),
        ("a\0b", "a-b-"),
        ("half \udc80", "half-"),
    ],
)
def test_names_stay_inside_the_output_folder(tmp_path: Path, name: str, expected: str) -> None:
    """Where something is lost a hash of the name follows."""
    folder = choose_run_folder(tmp_path, name, fresh=False).path
    assert folder.parent == tmp_path
    if expected.endswith("-"):
        assert re.fullmatch(re.escape(expected) + "[0-9a-f]{8}", folder.name)
    else:
        assert folder.name == expected
    assert choose_run_folder(tmp_path, folder.name, fresh=False).path == folder, "it names itself"
    RunFolder(folder).make()


def test_distinct_names_get_distinct_folders(tmp_path: Path) -> None:
    names = [
        "a/b", "a-b", "a b", "a  b", "a?b", "é", "è", "ü", "", ".", "..", "-", "日本", "🙂", "🙃",
        *("x" * 300 + end for end in "abc"), *("é" * 200 + end for end in "ab"), "x" * 180,
    ]  # fmt: skip
    folders = {choose_run_folder(tmp_path, name, fresh=False).path.name for name in names}
    assert len(folders) == len(names)
    assert max(len(folder.encode()) for folder in folders) < 200
    composed, apart = "\u00e9", "e\u0301"
    assert folder_name(composed) == folder_name(apart), "the same letter"


def test_a_run_that_an_earlier_version_began_goes_on_where_it_is(tmp_path: Path) -> None:
    """It made a-b of a/b, and ``run`` of every name outside ASCII, and did not keep the name."""
    facts = {"config": {"model": {"name": "a/b"}}}
    (tmp_path / "a-b").mkdir()
    (tmp_path / "a-b" / "run.json").write_text(json.dumps(facts))
    chosen = [choose_run_folder(tmp_path, name, fresh=False).path.name for name in ("a/b", "a?b")]
    assert chosen == ["a-b", folder_name("a?b")]
    (tmp_path / "a-b" / "run.json").write_text(json.dumps(facts | {"name": "a-b"}))
    assert choose_run_folder(tmp_path, "a/b", fresh=False).path.name == folder_name("a/b")


def zero(folder: Path) -> Path:
    return folder / "a\0b"


def endless(folder: Path) -> Path:
    return folder / ("x" * 300)


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def nowhere(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "runs"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (zero, "zero byte"),
        (endless, "File name too long"),
        (loop, "symbolic links"),
        (nowhere, "leads nowhere"),
        (file, "file is no folder"),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_an_output_folder_that_cannot_be(
    tmp_path: Path, place: Callable[[Path], Path], words: str, fresh: bool
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        choose_run_folder(place(tmp_path), "run", fresh=fresh)
    assert "output_dir" in str(caught.value.fix)


FOLDERS = ["checkpoints", "transcripts", "journal", "adapter", "answers"]
FILES = ["config.yml", "run.json", "metrics.jsonl", "evaluations.jsonl", "summary.json"]


@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_what_is_of_another_kind_is_told_before_anything_is_loaded(
    tmp_path: Path, name: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check_writable()
    folder.make()
    path = folder.path / name
    path.touch() if name in FOLDERS else path.mkdir()
    with pytest.raises(InputError, match="no folder" if name in FOLDERS else "no file") as caught:
        folder.check_writable()
    assert name in (caught.value.where or "")


@pytest.mark.parametrize("name", ["", *FOLDERS, *FILES])
def test_what_is_read_only_is_told_before_anything_is_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    path = folder.path / name
    path.touch() if name in FILES else path.mkdir(exist_ok=True)
    folder.check_writable()
    access = os.access
    monkeypatch.setattr(os, "access", lambda at, mode: at != path and access(at, mode))
    with pytest.raises(InputError, match=r"read-only|not ours"):
        folder.check_writable()


@pytest.mark.parametrize("known", [b"", b"\xff\xfe", b"../../x", b"A" * 16])
def test_the_id_for_wandb_is_made_once(tmp_path: Path, known: bytes) -> None:
    (tmp_path / "wandb-id").write_bytes(known)
    made = RunFolder(tmp_path).wandb_id()
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert RunFolder(tmp_path).wandb_id() == made
    assert RunFolder(tmp_path).wandb_id(renew=True) != made


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


def test_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    others = ["step-000003-best", "damaged-step-000009", ".tmp-9-1", "step-x", "step-9"]
    for name in ("step-1000000", "step-999999", "step-000002", *others):
        (tmp_path / name).mkdir()
    assert [*saved_steps(tmp_path)] == [2, 999_999, 1_000_000]
    assert saved_steps(tmp_path)[2] == tmp_path / "step-000002"
    assert saved_steps(tmp_path / "none") == {}


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "first").make()
    assert list((tmp_path / "runs" / "first").iterdir()) == []
