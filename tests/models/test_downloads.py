"""How far a download is, read from the cache while a real client fetches from a hub on loopback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.models.conftest import COMMIT, FakeHub
from tests.models.folders import model_folder
from tests.models.scripted_hub import ScriptedHub, blob_of, serve

from rnow.display.downloads import Download
from rnow.errors import ModelError
from rnow.models import downloads
from rnow.models.downloads import missing_bytes, watched
from rnow.models.hub import check_room
from rnow.models.refusal import Refusal
from rnow.models.resolve import resolve_model
from rnow.models.resolved import HubFile

RESOLVE = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from rnow.errors import RnowError
from rnow.models import downloads
from rnow.models.resolve import resolve_model

constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # it writes as often as it receives so much
downloads.LOOK_SECONDS = 0.02
seen = []
try:
    found = resolve_model(
        "org/model",
        key="model.path",
        base_dir=Path(),
        weights=sys.argv[1:] != ["check"],
        watch=lambda download: seen.append([download.done, download.total]),
    )
except RnowError as error:
    raise SystemExit(error.render())
files = sorted(path.name for path in found.local_dir.iterdir())
print(json.dumps({"seen": seen, "missing": found.missing_bytes, "files": files}))
"""
SIZE = 1_500_000


def weights(size: int = SIZE) -> bytes:
    """A whole safetensors file of zeros."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = model_folder(tmp_path_factory.mktemp("repository"))
    (folder / "model.safetensors").unlink()
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    shards = {f"model-0000{n}-of-00002.safetensors": weights(SIZE + n) for n in (1, 2)}
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(shards)}}
    return (
        found
        | shards
        | {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "README.md": b"A model.\n",
        }
    )


@pytest.fixture
def hub_(files: dict[str, bytes]) -> Iterator[ScriptedHub]:
    with serve(ScriptedHub(models={"org/model": files}, seconds=0.5)) as hub:
        yield hub


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def wanted(files: dict[str, bytes]) -> int:
    return sum(len(content) for name, content in files.items() if name != "README.md")


def test_bytes_grow_until_all_are_there(
    hub_: ScriptedHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub_.cut = {"model-00001-of-00002.safetensors"}  # the client asks for the rest of it
    found = ended(hub_.run(tmp_path, RESOLVE))
    done, totals = zip(*found["seen"], strict=True)
    assert set(totals) == {wanted(files)}
    assert found["missing"] == 0
    assert list(done) == sorted(done)
    assert done[-1] == wanted(files)
    assert len({size for size in done if 0 < size < wanted(files)}) >= 3
    assert set(found["files"]) == files.keys() - {"README.md"}
    again = ended(hub_.run(tmp_path, RESOLVE))
    assert (again["seen"], again["missing"]) == ([], 0)
    # Without a hub: what no model needs was never fetched, and is not missed.
    offline = ended(hub_.run(tmp_path, RESOLVE, HF_HUB_OFFLINE="1"))
    assert offline["files"] == found["files"]


def test_a_check_fetches_what_is_small_and_says_what_is_not(
    hub_: ScriptedHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RESOLVE, "check"],
        env=hub_.environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = ended(process)
    large = {name: len(content) for name, content in files.items() if name.endswith("tensors")}
    assert found["missing"] == sum(large.values())
    assert set(found["files"]) == files.keys() - {"README.md", *large}


def test_what_is_there_already_is_not_counted(
    hub_: ScriptedHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    blobs = tmp_path / "hub" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    first, second = sorted(name for name in files if name.endswith(".safetensors"))
    (blobs / blob_of(first, files[first])).write_bytes(files[first])
    half = blobs / f"{blob_of(second, files[second])}.incomplete"
    half.write_bytes(files[second][: SIZE // 2])
    os.utime(half, (1, 1))  # of an attempt long ago
    found = ended(hub_.run(tmp_path, RESOLVE))
    total = wanted(files) - len(files[first])
    assert {pair[1] for pair in found["seen"]} == {total}
    assert found["seen"][0][0] < SIZE // 2
    assert found["seen"][-1][0] == total


def test_who_waits_for_another_process_sees_it_fetch(
    hub_: ScriptedHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub_.seconds = 1.0
    both = [hub_.run(tmp_path, RESOLVE) for _ in range(2)]
    for found in map(ended, both):
        assert set(found["files"]) == files.keys() - {"README.md"}
        if found["seen"]:  # the later one may have found everything there
            assert found["seen"][-1][0] == found["seen"][-1][1]
    fetched = [line for line in hub_.asked if line.startswith("GET") and ".safetensors" in line]
    assert len([line for line in fetched if "index" not in line]) == 2, "each once"


def test_nothing_is_told_where_nothing_is_missing(hub: FakeHub, tmp_path: Path) -> None:
    with watched("org/model", COMMIT, [], lambda download: pytest.fail("told")):
        pass
    hub.files = {"config.json": 5, "tokenizer.json": 5, "model.safetensors": 5}
    hub.local = model_folder(tmp_path / "local")
    told: list[Download] = []
    found = resolve_model("org/model", key="model.path", base_dir=tmp_path, watch=told.append)
    assert (told[-1].done, told[-1].total) == (15, 15)
    assert [file.name for file in found.files] == sorted(hub.files)


def test_a_fault_in_the_middle_ends_the_watching(tmp_path: Path, hub: FakeHub) -> None:
    told: list[Download] = []
    with (
        pytest.raises(ZeroDivisionError),
        watched("org/model", COMMIT, [HubFile(name="a", size=9, blob="b")], told.append),
    ):
        raise ZeroDivisionError
    assert [download.done for download in told] == [0] * len(told)


def test_a_hole_in_a_file_is_not_there_yet(tmp_path: Path, hub: FakeHub) -> None:
    file = HubFile(name="w.safetensors", size=1 << 24, blob="b" * 64)
    look = downloads._Look("org/model", COMMIT, [file])
    part = tmp_path / "cache" / "models--org--model" / "blobs" / f"{file.blob}.1a2b3c4d.incomplete"
    part.parent.mkdir(parents=True)
    with part.open("wb") as stream:
        stream.seek((1 << 24) - 4096)
        stream.write(b"x" * 4096)
    assert look.now().done <= 1 << 16
    os.utime(part, (1, 1))
    assert look.now().done == 0
    assert missing_bytes("org/model", COMMIT, [file]) == 1 << 24


def test_models_that_fit_alone_and_not_together(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda place: type("Usage", (), {"free": 15_000_000_000})()
    )
    one, other = (Refusal(path=f"org/{name}", key=f"{name}.path") for name in ("model", "teacher"))
    check_room([(one, 10_000_000_000), (other, 5_000_000_000)])
    with pytest.raises(ModelError) as caught:
        check_room([(one, 10_000_000_000), (other, 6_000_000_000)])
    text = caught.value.render()
    assert "the models need 16.0 GB of disk, 15.0 GB are free" in text
    assert "teacher.path: 'org/teacher', 6.0 GB" in text
    assert "export HF_HOME=" in text
