"""Adapters written for a server to load."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rnow.sampling.adapter_files import AdapterFiles
from rnow.types import Adapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(params=[False, True], ids=["on disk", "in memory"])
def in_memory(request: pytest.FixtureRequest) -> bool:
    return request.param


def adapter(value: float = 1.0) -> Adapter:
    # A transposed view: what is written must be contiguous.
    return Adapter(
        tensors={NAME: torch.full((3, 2), value).T.requires_grad_()},
        config={"peft_type": "LORA", "r": 2, "lora_alpha": 4},
    )


def test_an_adapter_is_written_as_peft_reads_it(tmp_path: Path, in_memory: bool) -> None:
    files = AdapterFiles(tmp_path / "new" / "adapters", in_memory=in_memory)
    stored = files.write(adapter(0.5), 7)
    assert stored.version == 7
    assert stored.folder.name == "adapter-7"
    assert stored.folder.is_absolute()
    tensors = load_file(stored.folder / "adapter_model.safetensors")
    assert torch.equal(tensors[NAME], torch.full((2, 3), 0.5))
    config = json.loads((stored.folder / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    assert sorted(path.name for path in (tmp_path / "new" / "adapters").iterdir()) == ["adapter-7"]


def test_no_name_comes_back(tmp_path: Path) -> None:
    """Not for the same version, and not in another run that writes to the same place."""
    names = set()
    for _ in range(3):
        files = AdapterFiles(tmp_path)
        names |= {files.write(adapter(), 1).name, files.write(adapter(), 1).name}
        numbers = {files.write(adapter(), 2).number, files.write(adapter(), 3).number}
        assert numbers == {3, 4}
    assert len(names) == 6


def test_a_version_written_again_replaces_its_files(tmp_path: Path, in_memory: bool) -> None:
    files = AdapterFiles(tmp_path, in_memory=in_memory)
    files.write(adapter(1.0), 1)
    stored = files.write(adapter(2.0), 1)
    assert load_file(stored.folder / "adapter_model.safetensors")[NAME][0, 0] == 2.0


@pytest.mark.parametrize(
    ("private", "folder", "file"), [(True, 0o700, 0o600), (False, 0o755, 0o644)]
)
def test_who_may_read_it(
    tmp_path: Path, private: bool, folder: int, file: int, in_memory: bool
) -> None:
    files = AdapterFiles(tmp_path / "adapters", private=private, in_memory=in_memory)
    stored = files.write(adapter(), 1)
    assert stat.S_IMODE(stored.folder.stat().st_mode) == folder
    assert {stat.S_IMODE(path.stat().st_mode) for path in stored.folder.iterdir()} == {file}


def test_discard_and_clear(tmp_path: Path, in_memory: bool) -> None:
    files = AdapterFiles(tmp_path / "adapters", in_memory=in_memory)
    one, two = files.write(adapter(), 1), files.write(adapter(), 2)
    files.discard(one)
    assert not one.folder.exists()
    assert two.folder.exists()
    files.clear()
    assert not (tmp_path / "adapters").exists()
    assert not files._held


def test_it_is_rounded_to_the_format_of_whom_it_is_for(tmp_path: Path, in_memory: bool) -> None:
    files = AdapterFiles(tmp_path, dtype=torch.bfloat16, in_memory=in_memory)
    stored = files.write(adapter(1 / 3), 1)
    tensor = load_file(stored.folder / "adapter_model.safetensors")[NAME]
    assert torch.equal(tensor, torch.full((2, 3), 1 / 3).bfloat16())


@pytest.mark.skipif(sys.platform != "linux", reason="its files in memory")
def test_nothing_of_it_outlives_a_killed_process(tmp_path: Path) -> None:
    """Not even in the memory that is mounted as a folder."""
    script = """
import os, pathlib, signal, sys, torch
from rnow.sampling.adapter_files import AdapterFiles
from rnow.types import Adapter
folder = pathlib.Path(sys.argv[1])
weights = {"a": torch.ones(1000)}
stored = AdapterFiles(folder, in_memory=True).write(Adapter(tensors=weights, config={"r": 1}), 1)
assert (stored.folder / "adapter_model.safetensors").stat().st_size > 4000
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    left = tmp_path / "adapter-1" / "adapter_model.safetensors"
    assert left.is_symlink()
    assert not left.exists()
    # The next process writes over it.
    files = AdapterFiles(tmp_path, in_memory=True)
    stored = files.write(adapter(2.0), 1)
    assert load_file(stored.folder / "adapter_model.safetensors")[NAME][0, 0] == 2.0
    files.clear()


def test_without_such_files_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    stored = AdapterFiles(tmp_path, in_memory=True).write(adapter(), 1)
    weights = stored.folder / "adapter_model.safetensors"
    assert not weights.is_symlink()
    assert load_file(weights)[NAME].shape == (2, 3)
