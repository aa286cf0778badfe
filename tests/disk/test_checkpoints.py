"""Checkpoints: what a crash, a full disk and a flipped bit may and may not do to them."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rnow.disk import checkpoints as module
from rnow.disk.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MOMENTS,
    STATE,
    CheckpointStore,
    export_adapter,
    random_state,
    restore_random_state,
)
from rnow.errors import EXIT_TEMPORARY, InputError, TemporaryError
from rnow.types import Adapter

FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MOMENTS, STATE, MANIFEST)


def adapter_of(step: int) -> Adapter:
    tensors = {"base_model.model.q.lora_A.weight": torch.full((4, 8), float(step))}
    return Adapter(tensors=tensors, config={"r": 4, "peft_type": "LORA"})


class Shelf:
    """A store on a folder, and what it warned of."""

    def __init__(self, folder: Path, keep: int = 2, run: str | None = None) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.store = CheckpointStore(folder, keep=keep, warn=self.warnings.append, run=run)

    def save(self, *steps: int) -> None:
        for step in steps:
            self.store.save(
                step,
                adapter=adapter_of(step),
                moments={"q.exp_avg": torch.full((4,), step / 2)},
                state={"step": step, "nan": float("nan"), "text": "ü"},
            )

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def step(self, number: int) -> Path:
        return self.folder / f"step-{number:06d}"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "checkpoints")


def test_round_trip(shelf: Shelf) -> None:
    shelf.save(3)
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 3
    assert found.folder == shelf.step(3)
    assert torch.equal(found.adapter["base_model.model.q.lora_A.weight"], torch.full((4, 8), 3.0))
    assert torch.equal(found.moments["q.exp_avg"], torch.full((4,), 1.5))
    assert found.state == {"step": 3, "nan": None, "text": "ü"}


def test_only_safetensors_and_json(shelf: Shelf) -> None:
    shelf.save(3)
    assert sorted(path.name for path in shelf.step(3).iterdir()) == sorted(FILES)


def test_no_folder_no_checkpoint(shelf: Shelf) -> None:
    assert shelf.store.latest() is None
    assert shelf.store.newest_step() is None


def test_the_newest_wins_by_number(shelf: Shelf) -> None:
    shelf.save(9, 10)
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 10
    assert shelf.store.newest_step() == 10


@pytest.mark.parametrize("keep", [0, 2, 3])
def test_pruning_keeps_the_newest_and_never_fewer_than_two(tmp_path: Path, keep: int) -> None:
    shelf = Shelf(tmp_path, keep=keep)
    shelf.save(1, 2, 3, 4, 5)
    kept = max(2, keep)
    assert shelf.names == [f"step-{step:06d}" for step in range(6 - kept, 6)]


def test_saving_a_step_again_replaces_it(shelf: Shelf) -> None:
    shelf.save(1, 2, 2)
    assert shelf.names == ["step-000001", "step-000002"]
    assert shelf.store.latest() is not None


# ---- damage --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, remove, flip])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_moved_aside_and_the_next_is_used(
    shelf: Shelf, name: str, damage: Callable[[Path], None]
) -> None:
    shelf.save(1, 2)
    damage(shelf.step(2) / name)
    found = shelf.store.latest()
    assert found is not None
    if name == MANIFEST and damage is flip and found.step == 2:
        # A flipped blank at the manifest's end may still be the same JSON.
        assert json.loads((shelf.step(2) / MANIFEST).read_text())["step"] == 2
        return
    assert found.step == 1
    assert shelf.names == ["damaged-step-000002", "step-000001"]
    assert "step-000002" in shelf.warnings[0]
    assert "damaged-step-000002" in shelf.warnings[0]


def test_every_bit_of_the_manifest(shelf: Shelf) -> None:
    """Whatever bit of the manifest flips, loading gives a checkpoint or moves it aside; it never crashes."""
    shelf.save(1, 2)
    good = (shelf.step(2) / MANIFEST).read_bytes()
    for position in range(0, len(good), 3):
        data = bytearray(good)
        data[position] ^= 1 << (position % 7)
        (shelf.step(2) / MANIFEST).write_bytes(data)
        found = shelf.store.latest()
        assert found is not None
        if found.step == 1:
            aside = shelf.folder / "damaged-step-000002"
            aside.rename(shelf.step(2))


@pytest.mark.parametrize(
    "text", ["[]", '{"files": {}}', '{"files": []}', '{"files": {"a": 3}}', "3"]
)
def test_a_manifest_that_says_nothing_is_no_manifest(shelf: Shelf, text: str) -> None:
    shelf.save(1, 2)
    (shelf.step(2) / MANIFEST).write_text(text)
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 1


def test_what_this_user_may_not_read_is_not_damaged(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.save(1, 2)

    def refused(path: Path) -> str:  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "sha256_of", refused)
    with pytest.raises(InputError, match="may not read checkpoint step-000002"):
        shelf.store.latest()
    assert sorted(path.name for path in shelf.folder.iterdir()) == ["step-000001", "step-000002"]


def test_all_damaged_is_an_input_error_that_names_each(shelf: Shelf) -> None:
    shelf.save(1, 2)
    flip(shelf.step(1) / ADAPTER_WEIGHTS)
    remove(shelf.step(2) / MANIFEST)
    with pytest.raises(InputError, match="every checkpoint of this run is damaged") as caught:
        shelf.store.latest()
    text = caught.value.render()
    assert "step-000002: no manifest" in text
    assert "step-000001: adapter_model.safetensors was changed" in text
    assert "--fresh" in text
    assert shelf.names == ["damaged-step-000001", "damaged-step-000002"], "nothing is deleted"


def test_all_damaged_stays_an_error_when_it_is_asked_again(shelf: Shelf) -> None:
    """A restart loop repeats the command: the run must not begin again over its own files."""
    shelf.save(1)
    flip(shelf.step(1) / ADAPTER_WEIGHTS)
    for _ in range(3):
        with pytest.raises(InputError, match="every checkpoint of this run is damaged") as caught:
            shelf.store.latest()
        assert "step-000001" in caught.value.render()
    (shelf.folder / "damaged-step-000001").rename(shelf.step(1))
    flip(shelf.step(1) / ADAPTER_WEIGHTS)
    found = shelf.store.latest()
    assert found is not None, "the file was mended and put back"


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("damage", [make_folder, nest, loop])
def test_a_manifest_that_cannot_be_read_is_damage(
    shelf: Shelf, damage: Callable[[Path], None]
) -> None:
    shelf.save(1, 2)
    damage(shelf.step(2) / MANIFEST)
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 1
    assert shelf.names == ["damaged-step-000002", "step-000001"]


def test_a_checkpoint_under_another_name_is_not_that_step(shelf: Shelf) -> None:
    shelf.save(1, 2)
    shelf.step(1).rename(shelf.step(3))
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 2
    assert "it is step 1 under another name" in shelf.warnings[0]


def reseal(folder: Path) -> None:
    """Make the manifest fit what the files hold now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def hold(name: str, value: float) -> Callable[[Path], None]:
    """One number of one tensor is another."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        next(iter(tensors.values())).view(-1)[3] = value
        save_file(tensors, folder / name)

    return change


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


NAN, INF = float("nan"), float("inf")
WRONG = [
    (hold(ADAPTER_WEIGHTS, NAN), "numbers that are not finite"),
    (hold(ADAPTER_WEIGHTS, -INF), "numbers that are not finite"),
    (hold(MOMENTS, INF), "numbers that are not finite"),
    (overwrite(MOMENTS, pickle.dumps({"a": 1})), "optimizer.safetensors cannot be read"),
    (overwrite(ADAPTER_WEIGHTS, b""), "adapter_model.safetensors cannot be read"),
    (overwrite(STATE, b"[1, 2]"), "state.json is not the state of a run"),
    (overwrite(STATE, b"[" * 100_000), "state.json is not the state of a run"),
    (overwrite(STATE, b'{"updates": "two"}'), "state.json is not the state of a run"),
    (overwrite(STATE, b'{"updates": 2, "counters": {"seconds": "x"}}'), "state.json is not"),
    (overwrite(STATE, b"\xff\xfe"), "state.json is not the state of a run"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_what_verifies_and_is_wrong_is_damage(
    shelf: Shelf, change: Callable[[Path], None], words: str
) -> None:
    """The sizes and hashes of the manifest fit, and the checkpoint would train on nonsense."""
    shelf.save(1, 2)
    change(shelf.step(2))
    reseal(shelf.step(2))
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 1
    assert words in shelf.warnings[0]
    assert shelf.names == ["damaged-step-000002", "step-000001"]


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    mine, other = Shelf(tmp_path / "mine", run="aaaa"), Shelf(tmp_path / "other", run="bbbb")
    mine.save(1)
    other.save(2)
    shutil.copytree(other.step(2), mine.step(2))
    found = mine.store.latest()
    assert found is not None
    assert found.step == 1
    assert "step-000002 is damaged (it is of another run)" in mine.warnings[0]


def test_checkpoints_of_an_earlier_version_name_no_run(tmp_path: Path) -> None:
    Shelf(tmp_path).save(1)
    found = Shelf(tmp_path, run="aaaa").store.latest()
    assert found is not None
    Shelf(tmp_path, run="aaaa").save(2)
    found = Shelf(tmp_path).store.latest()
    assert found is not None
    assert found.step == 2, "and where the run's own id is lost, any is taken"


def test_saving_does_not_bring_a_removed_run_back(shelf: Shelf) -> None:
    shelf.save(1)
    shutil.rmtree(shelf.folder.parent)
    with pytest.raises(FileNotFoundError):
        shelf.save(2)
    assert not shelf.folder.parent.exists()


def test_folders_of_other_names_are_left_alone(shelf: Shelf) -> None:
    shelf.save(1, 2)
    shutil.copytree(shelf.step(2), shelf.folder / "step-backup")
    (shelf.folder / "step-1").mkdir()
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 2
    shelf.save(3, 4)
    assert {"step-backup", "step-1"} <= set(shelf.names)


def test_a_second_damaged_one_gets_a_name_of_its_own(shelf: Shelf) -> None:
    for _ in range(2):
        shelf.save(1, 2)
        flip(shelf.step(2) / MOMENTS)
        shelf.store.latest()
    assert shelf.names == ["damaged-step-000002", "damaged-step-000002-2", "step-000001"]


def test_leftovers_of_a_crash_are_removed(shelf: Shelf) -> None:
    shelf.save(1)
    shutil.copytree(shelf.step(1), shelf.folder / ".tmp-2-999")
    shutil.copytree(shelf.step(1), shelf.folder / ".tmp-old-step-000000")
    found = shelf.store.latest()
    assert found is not None
    assert shelf.names == ["step-000001"]


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_too_little_space_is_known_before_writing(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.save(1)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1000, 990, 10))
    with pytest.raises(TemporaryError, match="last good checkpoint is step 1") as caught:
        shelf.save(2)
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert shelf.names == ["step-000001"]
    needed, free = re.findall(r"([\d,]+) bytes", caught.value.why or "")
    assert int(needed.replace(",", "")) > int(free) == 10, "also where both are the same in MB"


@pytest.mark.parametrize("at", range(5))
def test_a_disk_that_fills_up_while_saving(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    shelf.save(1)
    written: list[Path] = []
    write = module.write_synced

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > at:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_synced", full)
    with pytest.raises(TemporaryError, match="no space left") as caught:
        shelf.save(2)
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert shelf.names == ["step-000001"], "half a checkpoint is taken away again"
    monkeypatch.undo()
    found = shelf.store.latest()
    assert found is not None
    assert found.step == 1
    shelf.save(2)
    assert shelf.store.newest_step() == 2


def test_another_fault_of_the_disk_is_not_called_full(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, data: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "write_synced", broken)
    with pytest.raises(OSError, match="Input/output error"):
        shelf.save(1)


# ---- kill -9 -------------------------------------------------------------------------------------------------------

SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from rnow.disk.checkpoints import CheckpointStore
from rnow.types import Adapter

torch.set_num_threads(1)
store = CheckpointStore(Path(sys.argv[1]), keep=2, warn=lambda text: None)
store.latest()
step = store.newest_step() or 0
while True:
    step += 1
    tensor = torch.full((64, 512), float(step))
    store.save(step, adapter=Adapter(tensors={"a": tensor}, config={"r": 1}),
               moments={"m": tensor}, state={"step": step})
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


def test_kill_at_any_moment_leaves_a_usable_checkpoint(shelf: Shelf) -> None:
    committed = 0
    for trial in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(shelf.folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline(), "it saved once"
        time.sleep(0.011 * (trial + 1))
        process.kill()
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
        told = [int(line) for line in rest.split("\n")[:-1]]
        found = shelf.store.latest()
        assert found is not None
        assert shelf.warnings == [], "the newest is whole"
        assert found.step >= max([committed + 1, *told])
        assert torch.equal(found.adapter["a"], torch.full((64, 512), float(found.step)))
        committed = found.step
    assert not [name for name in shelf.names if not name.startswith("step-")]


@pytest.mark.parametrize("moment", ["rename", "sync_folder", "prune"])
def test_a_crash_at_each_point_of_the_commit(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*args: Any, **kwargs: Any) -> None:
        raise Crash

    shelf.save(1, 2)
    if moment == "rename":
        monkeypatch.setattr(Path, "rename", crash)
    elif moment == "sync_folder":
        monkeypatch.setattr(module, "sync_folder", crash)
    else:
        monkeypatch.setattr(module.shutil, "rmtree", crash)
        monkeypatch.setattr(
            CheckpointStore,
            "_write_aside",
            _without_clearing(CheckpointStore._write_aside, monkeypatch),
        )
    with pytest.raises(Crash):
        shelf.save(3)
    monkeypatch.undo()
    found = shelf.store.latest()
    assert found is not None
    assert found.step == (3 if moment == "prune" else 2)
    assert shelf.warnings == []


def _without_clearing(write: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``_write_aside`` with its own rmtree allowed, so that the crash comes in the prune."""
    crash = module.shutil.rmtree

    def changed(self: CheckpointStore, aside: Path, step: int, files: Any) -> None:
        monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        write(self, aside, step, files)
        monkeypatch.setattr(module.shutil, "rmtree", crash)

    return changed


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_the_exported_adapter_is_readable_by_others(tmp_path: Path) -> None:
    os.umask(mask := os.umask(0o022))
    export_adapter(adapter_of(3), tmp_path / "adapter")
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    assert torch.equal(
        load_file(weights)["base_model.model.q.lora_A.weight"], torch.full((4, 8), 3.0)
    )
    assert json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())["r"] == 4
    assert weights.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        ADAPTER_CONFIG, ADAPTER_WEIGHTS,
    ]  # fmt: skip


def test_the_random_state_survives(shelf: Shelf) -> None:
    state = random_state()
    expected = torch.rand(3)
    torch.rand(5)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), expected)
    restore_random_state({})
