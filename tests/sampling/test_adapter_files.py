"""Adapters written for a server to load."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rnow.sampling.adapter_files import AdapterFiles
from rnow.types import Adapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter(value: float = 1.0) -> Adapter:
    # A transposed view: what is written must be contiguous.
    return Adapter(
        tensors={NAME: torch.full((3, 2), value).T.requires_grad_()},
        config={"peft_type": "LORA", "r": 2, "lora_alpha": 4},
    )


def test_an_adapter_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    stored = AdapterFiles(tmp_path / "new" / "adapters").write(adapter(0.5), 7)
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


def test_a_version_written_again_replaces_its_files(tmp_path: Path) -> None:
    files = AdapterFiles(tmp_path)
    files.write(adapter(1.0), 1)
    stored = files.write(adapter(2.0), 1)
    assert load_file(stored.folder / "adapter_model.safetensors")[NAME][0, 0] == 2.0


@pytest.mark.parametrize(
    ("private", "folder", "file"), [(True, 0o700, 0o600), (False, 0o755, 0o644)]
)
def test_who_may_read_it(tmp_path: Path, private: bool, folder: int, file: int) -> None:
    stored = AdapterFiles(tmp_path / "adapters", private=private).write(adapter(), 1)
    assert stat.S_IMODE(stored.folder.stat().st_mode) == folder
    assert {stat.S_IMODE(path.stat().st_mode) for path in stored.folder.iterdir()} == {file}


def test_discard_and_clear(tmp_path: Path) -> None:
    files = AdapterFiles(tmp_path / "adapters")
    one, two = files.write(adapter(), 1), files.write(adapter(), 2)
    files.discard(one)
    assert not one.folder.exists()
    assert two.folder.exists()
    files.clear()
    assert not (tmp_path / "adapters").exists()
