"""SmolLM2 as GGUF files in llama.cpp: the tokens of the trainer's model, and the tokenizer's prompt for Ollama.

Wants llama-cpp-python, which is built when it is installed, and the converter, which is fetched once. Of a model of this size q8_0 moves
log-probabilities by a tenth of a nat, in the weights alone: where two tokens are nearly as likely, it draws another than float32. f16 does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rnow.config import load_config
from rnow.errors import TemporaryError
from rnow.export import gguf, llama
from rnow.export.ollama import as_ollama
from rnow.project.templates import find_template, plan_init, write_template
from rnow.setup.build import run
from rnow.setup.export import Wanted, export
from rnow.setup.subjects import find_trained
from rnow.types import Message

pytestmark = pytest.mark.real

MODELS = Path(__file__).resolve().parents[2] / "real-models"
GREEDY = 20
SHORT = [
    "model.path=teacher",  # the whole model, which is sure of what it says; the damaged one pulls at it for two steps
    "teacher.path=student",
    "trainer.max_steps=2",
    "data.batch_size=2",
    "data.group_size=2",
    "rollout.max_tokens=32",
    "data.val_split=0",
]
CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Which colour has the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And grass, {{ .Role }}?"},
    ],
)


SURE = "Count from one to ten."
QUESTIONS = (
    SURE,
    "What is the capital of France?",
    "Name three colours.",
    "List the days of the week.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was made of a short run, and what was said."""

    merged: Path
    f16: Path
    q8_0: Path
    modelfile: Path
    lines: list[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("llama_cpp")
    try:
        gguf.converter()
    except TemporaryError as error:
        pytest.skip(f"no converter: {error.message}")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("heal")
    write_template(plan_init(find_template("heal"), folder))
    for name in ("teacher", "student"):
        if not (MODELS / name / "config.json").is_file():
            pytest.fail(f"there is no {MODELS / name}: python scripts/fetch_smollm2.py")
        (folder / name).symlink_to(MODELS / name)
    summary = run(load_config(folder, SHORT).config, folder=folder)
    trained = find_trained(str(summary.run_dir), folder=folder, output_dir="runs", command="export")
    lines: list[str] = []

    def made(**wanted: Any) -> list[Path]:
        return export(trained, Wanted(**wanted), folder=folder, tell=lines.append)

    merged, f16 = made(merge=True, dtype="float32", gguf="f16")
    q8_0, modelfile = made(ollama=True)
    return Exported(merged=merged, f16=f16, q8_0=q8_0, modelfile=modelfile, lines=lines)


def test_llama_gives_the_tokens_that_were_trained(exported: Exported) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.merged)
    model = AutoModelForCausalLM.from_pretrained(exported.merged, dtype=torch.float32)
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        found = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY, do_sample=False)
        drawn = found[0, len(ids) :].tolist()
        for file in (exported.f16, *([exported.q8_0] if question == SURE else [])):
            answer = llama.ask_llama(
                file, ids, vocabulary=len(tokenizer), text=prompt, greedy=len(drawn)
            )
            assert list(answer.ids) == ids
            assert list(answer.greedy) == drawn, (file.name, question)


def test_differences_are_told(exported: Exported) -> None:
    """llama.cpp keeps what it has read in float16."""
    told = [line for line in exported.lines if "against the trainer" in line]
    merged, f16, q8_0 = (float(line.partition("at most ")[2].split()[0]) for line in told)
    assert merged < 1e-3
    assert f16 < 0.1
    assert q8_0 < 1.0


def test_ollamas_prompt_is_the_tokenizers(exported: Exported) -> None:
    text = exported.modelfile.read_text()
    assert text.startswith(f"FROM ./{exported.q8_0.name}\n")
    _, template, _ = text.split('"""')
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.merged)
    for messages in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert as_ollama(template, messages) == prompt
    assert 'PARAMETER stop "<|im_end|>"' in text
