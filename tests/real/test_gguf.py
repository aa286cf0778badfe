"""SmolLM2 as a q8_0 GGUF file in llama.cpp: the tokens of the trainer's model, and the tokenizer's prompt for Ollama.

Wants llama-cpp-python, which is built when it is installed, and the converter, which is fetched once.
"""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """What was made of a short run, and what was said."""
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
    config = load_config(folder, SHORT).config
    summary = run(config, folder=folder)
    trained = find_trained(str(summary.run_dir), folder=folder, output_dir="runs", command="export")
    lines: list[str] = []
    wanted = Wanted(merge=True, dtype="float32", gguf="q8_0", ollama=True)
    return export(trained, wanted, folder=folder, tell=lines.append), lines


def test_llama_gives_the_tokens_that_were_trained(exported: tuple[list[Path], list[str]]) -> None:
    (merged, file, _), lines = exported
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for messages in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        drawn = model.generate(
            torch.tensor([ids]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
        )[0, len(ids) :].tolist()
        answer = llama.ask_llama(file, ids, vocabulary=len(tokenizer), text=prompt, greedy=GREEDY)
        assert list(answer.ids) == ids
        stop = next((i for i, t in enumerate(answer.greedy) if t in (0, 2)), GREEDY)
        assert list(answer.greedy)[:stop] == drawn[:stop]
    compared = [line for line in lines if "against the trainer" in line]
    assert len(compared) == 2, "the merged model and the file"


def test_ollamas_prompt_is_the_tokenizers(exported: tuple[list[Path], list[str]]) -> None:
    (merged, file, modelfile), _ = exported
    text = modelfile.read_text()
    assert text.startswith(f"FROM ./{file.name}\n")
    _, template, _ = text.split('"""')
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    for messages in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert as_ollama(template, messages) == prompt
    assert 'PARAMETER stop "<|im_end|>"' in text
