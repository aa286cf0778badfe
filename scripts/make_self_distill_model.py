"""Make what ``templates/self-distill`` ships: one tiny model that obeys hints, and ``train.jsonl`` with hints in it.

The task is that of the quickstart, to reverse a word. The model is trained on two kinds of prompts at once:

- ``Reverse: planet``: its answers slip as those of the quickstart's student do (``--slip-rate``), so that at temperature 1
  about half of them are right.
- ``Hint: tenalp`` and ``Reverse: planet`` below it: it answers with the hint, without a slip, and goes on correctly after
  a slip, as the quickstart's teacher does. Every other hint is no answer to the question, and the model is trained to give
  it all the same: it reads the hint, rather than taking the word "Hint" for a sign to be careful.

So the model with a hint is a teacher to itself without one. Words in ``train.jsonl`` appear in no training.

Usage: ``python scripts/make_self_distill_model.py [--out templates/self-distill] [--seed 0]`` (about five minutes).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from make_quickstart_models import (
    INSTRUCTION,
    Encoder,
    accuracy,
    build_tokenizer,
    corrected_answer,
    dataset_words,
    pseudo_word,
    random_letters,
    slipping_answer,
)
from tiny_models import build_model, padded, train
from transformers import Qwen3ForCausalLM

log = logging.getLogger("make_self_distill_model")

ROWS = 2560
HINT = "Hint: {context}\n{prompt}"
"""``teacher.template`` of the config."""


def write_dataset(path: Path, words: Sequence[str]) -> None:
    """One row per word; the answer is its context."""
    rows = (
        {
            "messages": [{"role": "user", "content": INSTRUCTION + word}],
            "privileged_context": word[::-1],
            "rewards": ["accuracy"],
            "metadata": {"answer": word[::-1]},
        }
        for word in words
    )
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def hinted(word: str, hint: str | None = None) -> str:
    """The question as the teacher reads it: with the answer as hint, or with another."""
    return HINT.format(context=hint or word[::-1], prompt=INSTRUCTION + word)


def any_word(rng: random.Random) -> str:
    """A word, or any letters."""
    return pseudo_word(rng) if rng.random() < 0.5 else random_letters(rng)


def batches(
    encoder: Encoder,
    *,
    slip_rate: float,
    size: int,
    excluded: set[str],
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), both [size, T]; -100 where nothing is predicted. Every other row has a hint."""
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < size:
            word = any_word(rng)
            if word in excluded:
                continue
            if len(rows) % 2:
                hint = word[::-1] if rng.random() < 0.5 else any_word(rng)
                prompt, rate = encoder.ask(hinted(word, hint)), rng.choice((0.0, 0.1, 0.3))
                answer = corrected_answer(list(hint.encode()), encoder.end, rate, rng)
            else:
                prompt = encoder.prompt(word)
                letters = list(word[::-1].encode())
                answer = slipping_answer(letters, encoder.end, slip_rate, rng)
            written, targets = answer
            rows.append((prompt + written, [-100] * (len(prompt) - 1) + targets))
        yield padded(rows, encoder.pad)


def parse_arguments() -> argparse.Namespace:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description="Make the model and the data of templates/self-distill."
    )
    parser.add_argument("--out", type=Path, default=root / "templates" / "self-distill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--slip-rate", type=float, default=0.09, help="per letter, in targets without a hint"
    )
    return parser.parse_args()


def main() -> None:
    """Write the tokenizer, the model and train.jsonl, and print how good the model is with hints and without."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    tokenizer, words = build_tokenizer(), dataset_words(arguments.seed)[:ROWS]
    encoder = Encoder(tokenizer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_dataset(arguments.out / "train.jsonl", words)

    model = build_model(tokenizer, layers=2, seed=arguments.seed)
    data = batches(
        encoder,
        slip_rate=arguments.slip_rate,
        size=arguments.batch_size,
        excluded=set(words),
        rng=random.Random(f"{arguments.seed}/self-distill"),
    )
    train(model, data, name="model", steps=arguments.steps, learning_rate=arguments.learning_rate)
    folder = arguments.out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shipped = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with_answer = Encoder(tokenizer, hinted)
    for name, asked in (("without a hint", encoder), ("with the answer as hint", with_answer)):
        share = accuracy(shipped, asked, words, temperature=1.0, seed=arguments.seed)
        log.info("%s: accuracy %.3f at temperature 1 (%d unseen words)", name, share, len(words))


if __name__ == "__main__":
    main()
