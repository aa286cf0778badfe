"""Only regular files are read: a pipe that nobody writes to would be waited on for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rnow.cli.options import load
from rnow.config import Config, load_config
from rnow.config.schema import DatasetSource
from rnow.errors import InputError
from rnow.models.adapter import find_adapter
from rnow.models.resolve import resolve_model
from rnow.project.project import is_agentic
from rnow.project.rows import RowRules
from rnow.project.secrets import load_secrets
from rnow.project.sources import read_source
from rnow.project.templates import find_template, plan_init
from rnow.project.user_code import load_rewards
from rnow.text.user_files import is_present, open_regular, read_regular

CONFIG = Config(
    dataset_type="distill",
    model={"path": "a/b"},
    teacher={"path": "a/c"},
)


def pipe(folder: Path, name: str) -> Path:
    os.mkfifo(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet", "train"])
def test_training_files(tmp_path: Path, name: str) -> None:
    pipe(tmp_path, name)
    with pytest.raises(InputError, match=f"{name} is a named pipe, not a file"):
        read_source(DatasetSource(path=name), RowRules(dataset_type="distill"), tmp_path)


def test_files_of_a_project(tmp_path: Path) -> None:
    for name in (".env", "rewards.py", "tools.py", "config.yml"):
        pipe(tmp_path, name)
    for read in (
        lambda: load_secrets(tmp_path),
        lambda: load_rewards(tmp_path),
        lambda: is_agentic(tmp_path, CONFIG),
        lambda: load_config(tmp_path),
        lambda: load_config(tmp_path / "config.yml"),
    ):
        with pytest.raises(InputError, match="is a named pipe, not a file") as caught:
            read()
        assert caught.value.fix


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_files_of_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    pipe(tmp_path / "model", name)
    with pytest.raises(InputError, match=f"{name} is a named pipe, not a file"):
        resolve_model("model", key="model.path", base_dir=tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="null is a device"):
        read_regular(Path("/dev/null"))
    with pytest.raises(InputError, match="is a folder"):
        open_regular(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(InputError, match="s is a socket"):
            is_present(tmp_path / "s")


def test_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "lost").symlink_to("nowhere")
    assert read_regular(tmp_path / "b") == b"x"
    assert is_present(tmp_path / "b")
    assert not is_present(tmp_path / "lost")
    assert not is_present(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "lost")


def read_as(setting: str, path: str, folder: Path) -> None:
    if setting == "model.path":
        resolve_model(path, key=setting, base_dir=folder)
    elif setting == "an adapter":
        find_adapter(path, key="model.path", places=[folder])
    elif setting == "-d":
        load(Path(path), ())
    elif setting == "--dir":
        plan_init(find_template("quickstart"), Path(path))
    else:
        read_source(DatasetSource(path=path), RowRules(dataset_type="distill"), folder)


@pytest.mark.parametrize(
    "path", ["~nobody-has-this-name/x", "x" * 300, "/" + "x" * 300, "a/" * 3000, "loop"]
)
@pytest.mark.parametrize("setting", ["model.path", "an adapter", "-d", "--dir", "data.train_file"])
def test_a_path_that_leads_nowhere_is_the_users_fault(
    tmp_path: Path, path: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as caught:
        read_as(setting, path, tmp_path)
    assert caught.value.where
    assert caught.value.why
    assert caught.value.fix
