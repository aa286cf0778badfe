"""Model folders: good ones, and every way one can be unusable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.folders import model_folder, write_json, write_safetensors, write_shards

from rnow.errors import ModelError
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel


def resolve(path: str, base_dir: Path, key: str = "teacher.path", **options: Any) -> ResolvedModel:
    return resolve_model(path, key=key, base_dir=base_dir, **options)


def refused(path: str, base_dir: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve(path, base_dir, **options)
    return caught.value


def test_a_folder_is_found_from_the_project_and_by_absolute_path(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "teacher")
    size = (folder / "model.safetensors").stat().st_size
    for path in ("models/teacher", "./models/teacher", "models/teacher/", str(folder)):
        found = resolve(path, tmp_path)
        assert (found.local_dir, found.revision) == (folder, None)
        assert found.weights_bytes == size
        assert found.name == "teacher"


def test_shards_are_added_up(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    one = (folder / "model.safetensors").stat().st_size
    write_shards(folder, 3, [1, 2, 3])
    assert resolve("m", tmp_path).weights_bytes == 3 * one


@pytest.mark.parametrize("name", ["m", "model.safetensors", "tokenizer.json", "config.json"])
def test_what_this_user_may_not_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model_folder(tmp_path / "m")
    # Root may read everything: the answer is scripted.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)
    error = refused("m", tmp_path)
    assert "this user may not read" in error.message
    assert "chmod" in str(error.fix)
    assert "damaged" not in error.render()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def not_a_model_with_one_inside(folder: Path) -> None:
    shutil.rmtree(folder)
    model_folder(folder / "checkpoint-10")


def gguf(folder: Path) -> None:
    empty(folder)
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qw', encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_a_download(folder: Path) -> None:
    write_shards(folder, 4, [1, 3])


def half_a_download_without_index(folder: Path) -> None:
    write_shards(folder, 3, [2], index=False)


def cut_weights(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", cut=1)


def cut_header(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", cut=20)


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def html_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        b"version https://git-lfs.example/spec/v1\noid sha256:0\n"
    )


def adapter(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})


FAULTS = [
    no_config,
    empty,
    not_a_model_with_one_inside,
    gguf,
    broken_config,
    no_tokenizer,
    only_bin,
    no_weights,
    half_a_download,
    half_a_download_without_index,
    cut_weights,
    cut_header,
    empty_weights,
    html_weights,
    lfs_pointer,
    adapter,
]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_faulty_folders(
    tmp_path: Path, check_golden: Callable[..., None], damage: Callable[[Path], None]
) -> None:
    damage(model_folder(tmp_path / "teacher"))
    before = sorted(tmp_path.rglob("*"))
    error = refused("teacher", tmp_path)
    assert error.where == "teacher.path"
    error.where = "config.yml:7 (teacher.path)"  # whoever read the config knows the line
    check_golden(f"folder_{damage.__name__}", error)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_student_is_called_student(tmp_path: Path) -> None:
    only_bin(model_folder(tmp_path / "m"))
    assert refused("m", tmp_path, key="model.path").title == "Unusable student model"


def test_a_folder_that_does_not_exist_suggests_its_neighbours(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    model_folder(tmp_path / "models" / "teacher-large")
    model_folder(tmp_path / "models" / "zebra")
    (tmp_path / "models" / "teacher-notes").mkdir()
    check_golden("folder_misspelt", refused("models/teacher-lagre", tmp_path))
    check_golden("folder_misspelt_dot", refused("./models/teacher-lagre", tmp_path))
    assert refused(str(tmp_path / "absent" / "m"), tmp_path).fix is not None


def test_a_file_is_no_folder(tmp_path: Path, check_golden: Callable[..., None]) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    check_golden("folder_is_a_file", refused("teacher.safetensors", tmp_path))


def test_deep_json_headers_that_are_no_headers_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    for header in (b"[1]", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b"null"):
        content = len(header).to_bytes(8, "little") + header
        (folder / "model.safetensors").write_bytes(content)
        assert "damaged" in refused("m", tmp_path).message
