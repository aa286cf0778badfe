"""``rnow export``: what is made of a finished run, how far it is from what was trained, and what is refused before that."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.heads import header, text
from tests.setup.projects import Project

from rnow.cli.main import run_command_line
from rnow.config import to_yaml
from rnow.errors import InputError, ModelError, RnowError
from rnow.export import gguf, hub, llama
from rnow.models.adapter import find_adapter
from rnow.setup import export as module
from rnow.setup.build import run
from rnow.setup.export import Wanted, export
from rnow.setup.subjects import Trained, find_trained

MakeModel = Callable[..., Path]
STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A project with a finished run of three steps, each a checkpoint."""
    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("exported") / "project", tiny_model_dir)
    config = project.config(
        trainer={"max_steps": STEPS, "save_step": 1, "learning_rate": 0.02, "keep_checkpoints": 4},
        data={"val_split": 0.2},
        evaluation={"num_samples": 1},
    )
    run(config, folder=project.folder)
    (project.folder / "config.yml").write_text(to_yaml(config))
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """Of its own, so that it may be changed."""
    shutil.copytree(finished.folder, tmp_path / "project")
    copy = Project(tmp_path / "elsewhere", finished.make_model)
    copy.folder = tmp_path / "project"
    return copy


class Told:
    """Exports, and what was said meanwhile."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.stages: list[str] = []

    def find(self, name: str = "tiny", step: int | None = None) -> Trained:
        return find_trained(
            name, folder=self.project.folder, output_dir="runs", step=step, command="export"
        )

    def export(self, name: str = "tiny", step: int | None = None, **wanted: Any) -> list[Path]:
        return export(
            self.find(name, step),
            Wanted(**wanted),
            folder=self.project.folder,
            tell=self.lines.append,
            stage=self.stages.append,
            warn=self.warnings.append,
        )

    def difference(self) -> float:
        """The largest that was told, in nats."""
        (line,) = [line for line in self.lines if "against the trainer" in line]
        return float(line.partition("at most ")[2].partition(" nats")[0])


@pytest.fixture
def told(project: Project) -> Told:
    return Told(project)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- the run's own adapter ----------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_with_tokenizer_and_card(finished: Project) -> None:
    adapter, base = finished.run_dir / "adapter", finished.student
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (adapter / name).read_bytes() == (base / name).read_bytes(), "verbatim"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["revision"] is None, "a folder has none"
    card = (adapter / "README.md").read_text()
    assert "| teacher |" in card
    assert "| held-out prompts | before | after |" in card
    assert "| steps | 3 |" in card
    assert str(finished.folder) not in card


def test_the_base_of_the_hub_is_named_with_its_revision(tiny_model_dir: MakeModel) -> None:
    from rnow.models.loading import load_causal_lm
    from rnow.policy.lora import attach_lora

    lm = load_causal_lm(
        tiny_model_dir(), vocabulary=100, dtype=torch.float32, device=torch.device("cpu")
    )
    model = attach_lora(lm, rank=2, alpha=4, seed=0, base_name="org/m", base_revision="abc123")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("org/m", "abc123")


# ---- adapter and merged model -------------------------------------------------------------------------------------


def test_the_adapter_of_a_step(told: Told, project: Project) -> None:
    (made,) = told.export(step=1)
    assert made == project.run_dir / "export" / "step-000001" / "adapter"
    checkpoint = load_file(project.run_dir / "checkpoints/step-000001/adapter_model.safetensors")
    found = load_file(made / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in checkpoint.items())
    assert told.difference() < 1e-5
    assert "1 (a checkpoint)" in (made / "README.md").read_text()
    assert (made / "tokenizer.json").is_file()
    # Another run can go on from it, and PEFT finds its base.
    assert find_adapter(str(made), key="model.path", places=[project.folder]) is not None
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(str(made))


def test_the_merged_model_is_what_was_trained(told: Told, project: Project) -> None:
    (made,) = told.export(merge=True)
    assert made == project.run_dir / "export" / "merged"
    assert told.difference() < 1e-5
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert expected | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names(
        made
    )
    assert names(made.parent) == {"merged"}, "nothing is left beside it"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(made))
    ids = AutoTokenizer.from_pretrained(str(made)).encode("hello")
    logits = model(torch.tensor([ids])).logits
    base = AutoModelForCausalLM.from_pretrained(str(project.student))
    assert (logits - base(torch.tensor([ids])).logits).abs().max() > 1e-3, "it is another model"


def test_rounding_is_told(told: Told) -> None:
    (made,) = told.export(merge=True, dtype="bfloat16")
    assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert told.difference() > 1e-5
    assert any("rounded to bfloat16; --dtype float32 rounds nothing" in line for line in told.lines)


def test_a_base_in_four_bits_is_told_from_the_trainers(told: Told, project: Project) -> None:
    facts = json.loads((project.run_dir / "run.json").read_text())
    facts["config"]["model"]["quantization"] = "nf4"
    (project.run_dir / "run.json").write_text(json.dumps(facts))
    told.export(merge=True)
    assert told.difference() > 1e-4
    assert any("the trainer held the base in nf4" in line for line in told.lines)


def test_what_is_not_what_was_trained_is_not_left_behind(
    told: Told, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.write_merged

    def wrong(merge: Any, folder: Path) -> None:
        whole(merge, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_merged", wrong)
    with pytest.raises(RnowError, match="is not what was trained"):
        told.export(merge=True)
    assert names(project.run_dir / "export") == set()


def test_interrupted_it_leaves_nothing(
    told: Told, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_merged", stop)
    with pytest.raises(KeyboardInterrupt):
        told.export(merge=True)
    assert names(project.run_dir / "export") == set()


def test_nothing_is_overwritten_without_force(told: Told) -> None:
    told.export()
    with pytest.raises(InputError, match="nothing is overwritten") as caught:
        told.export()
    assert "--force" in (caught.value.fix or "")
    told.export(force=True)


def test_another_base_is_refused_and_a_moved_one_is_taken(
    told: Told, project: Project, tmp_path: Path
) -> None:
    moved = shutil.copytree(project.student, tmp_path / "moved")
    told.export(merge=True, base=str(moved))
    assert told.difference() < 1e-5
    with pytest.raises(ModelError, match="trained on another model"):
        told.export(merge=True, base=str(project.teacher), force=True)


def test_a_base_that_is_gone(told: Told, project: Project) -> None:
    file = project.run_dir / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(ModelError, match="/no/such/model") as caught:
        told.export(merge=True)
    assert caught.value.fix == "say where the base model is now: --base PATH"


def test_options_that_nothing_would_read(told: Told) -> None:
    with pytest.raises(InputError, match="--dtype goes with --merge"):
        told.export(dtype="float32")
    with pytest.raises(InputError, match="--private goes with --push"):
        told.export(private=True)


def test_an_adapter_of_no_run(told: Told, project: Project, tmp_path: Path) -> None:
    copied = shutil.copytree(project.run_dir / "adapter", tmp_path / "mine" / "adapter")
    (made,) = told.export(str(copied), merge=True, output=tmp_path / "out")
    assert made == tmp_path / "out" / "merged"
    assert told.difference() < 1e-5


def test_room_is_looked_for_first(
    told: Told, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(project.folder)
    monkeypatch.setattr("rnow.export.place.shutil.disk_usage", lambda path: usage._replace(free=9))
    with pytest.raises(InputError, match=r"0\.0 GB are free"):
        told.export(merge=True)
    assert not (project.run_dir / "export").exists()


# ---- GGUF and Ollama ----------------------------------------------------------------------------------------------


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the converter's place, that keeps what it was given."""
    file, seen = tmp_path / "converter.py", tmp_path / "seen.json"
    made = header(tokenizer__ggml__model=struct.pack("<I", 8) + text("gpt2"))
    file.write_text(
        textwrap.dedent(f"""
        import json, sys
        from pathlib import Path
        model = Path(sys.argv[-1])
        config = json.loads((model / "config.json").read_text())
        Path({str(seen)!r}).write_text(json.dumps([config["dtype"], sorted(p.name for p in model.iterdir())]))
        Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes({made!r})
        """)
    )
    monkeypatch.setattr(gguf, "converter", lambda stage: [sys.executable, str(file)])
    monkeypatch.setattr(llama, "has_llama", lambda: False)
    return seen


def test_what_is_converted_is_merged_in_float32(
    told: Told, project: Project, converter: Path
) -> None:
    (made,) = told.export(gguf="f16")
    assert made == project.run_dir / "export" / "tiny-f16.gguf"
    dtype, files = json.loads(converter.read_text())
    assert dtype == "float32"
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= {*files}
    assert names(made.parent) == {"tiny-f16.gguf"}
    assert any("not compared" in line and "llama-cpp-python" in line for line in told.lines)


def test_for_ollama(told: Told, project: Project, converter: Path) -> None:
    model, made = told.export(ollama=True)
    assert model.name == "tiny-q8_0.gguf"
    text = made.read_text()
    assert text.startswith('FROM ./tiny-q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert any("letter by letter" in line for line in told.lines)
    assert any("ollama create tiny -f Modelfile" in line for line in told.lines)


def test_a_template_that_ollama_cannot_have_is_refused_before_anything_is_computed(
    told: Told, project: Project, converter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(project.student, tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}"
    )
    with pytest.raises(InputError, match="no template of Ollama's"):
        told.export(ollama=True, base=str(base))
    assert not converter.exists()
    assert not (project.run_dir / "export").exists()


def test_the_numbers_of_llama_are_compared(
    told: Told, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scripted llama.cpp, a little off and with other tokens."""
    asked: dict[str, Any] = {}

    def ask(file: Path, ids: list[int], *, vocabulary: int, text: str) -> llama.LlamaAnswer:
        asked.update(ids=ids, vocabulary=vocabulary, text=text)
        off = [value - 0.01 for value in trainer]
        return llama.LlamaAnswer(logprobs=off, ids=ids[1:], greedy=())

    export_ = module._Export(told.find(), Wanted(), told.project.folder, *[lambda text: None] * 3)
    trainer = export_._trainer
    monkeypatch.setattr(llama, "has_llama", lambda: True)
    monkeypatch.setattr(llama, "ask_llama", ask)
    told.export(gguf="q8_0")
    assert told.difference() == pytest.approx(0.01, rel=1e-2)
    assert asked["vocabulary"] == 100
    assert "float on water" in asked["text"]
    assert any("other tokens" in warning for warning in told.warnings)


def test_types_that_the_converter_has_not(told: Told) -> None:
    with pytest.raises(InputError, match="is not one of"):
        told.export(gguf="q4_k_m")


# ---- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def push(repository: str, files: Mapping[str, Path], **options: Any) -> str:
        held = {name: Path(path).read_bytes() for name, path in files.items()}
        found.update(repository=repository, files=held, **options)
        return f"https://hub.example/{repository}"

    monkeypatch.setattr(hub, "push", push)
    monkeypatch.setattr(hub, "check_repository", lambda repository, force: None)
    return found


def test_the_adapter_is_pushed(told: Told, pushed: dict[str, Any]) -> None:
    told.export(push="ann/tiny", private=True)
    assert pushed["repository"] == "ann/tiny"
    assert pushed["private"]
    assert pushed["message"] == "tiny, after step 3"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= {
        *pushed["files"]
    }
    assert any("names the base by its folder" in warning for warning in told.warnings)
    assert told.lines[-1] == "pushed: https://hub.example/ann/tiny"


def test_a_gguf_file_is_pushed_with_a_card(
    told: Told, project: Project, converter: Path, pushed: dict[str, Any]
) -> None:
    told.export(ollama=True, push="ann/tiny")
    assert {"tiny-q8_0.gguf", "Modelfile", "README.md"} <= {*pushed["files"]}
    assert b"library_name: gguf" in pushed["files"]["README.md"]
    assert names(project.run_dir / "export") == {"tiny-q8_0.gguf", "Modelfile"}


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command(
    project: Project,
    converter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project.folder)
    assert run_command_line(["export", "tiny", "--merge", "--gguf", "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert "export/step-000002/merged" in shown.replace("\n", "")
    assert "export/step-000002/tiny-q8_0.gguf" in shown.replace("\n", "")
    assert shown.count("against the trainer") == 1
    assert run_command_line(["export", "tiny", "--merge", "-s", "2"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert run_command_line(["export", "tin"]) == 2
    assert "rnow export tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["export", "r", "--gguf"], ["export", "r", "--gguf", "q8_0"]),
        (["export", "--gguf", "r"], ["export", "--gguf", "q8_0", "r"]),
        (["export", "--gguf", "--force", "r"], ["export", "--gguf", "q8_0", "--force", "r"]),
        (["export", "--gguf", "f16", "r"], ["export", "--gguf", "f16", "r"]),
        (["export", "--gguf", "Q4_K_M", "r"], ["export", "--gguf", "Q4_K_M", "r"]),
        (["serve", "--gguf"], ["serve", "--gguf"]),
        ([], []),
    ],
)
def test_the_type_may_be_left_out(given: list[str], expected: list[str]) -> None:
    from rnow.cli.export import with_default_type

    assert with_default_type(given) == expected
