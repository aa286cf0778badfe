"""Make the data that ``templates/sft`` and ``templates/posttrain`` ship. The model of both is the quickstart's student.

- ``sft``: the quickstart's first words, each with its right answer. The student slips in about half of its answers; what it
  has to learn is in the rows.
- ``posttrain``: short entries of a field guide to animals that do not exist, in the same few kinds of sentences. The student
  has only ever seen single words: it learns the letters, the words and the sentences of the guide.

Usage: ``python scripts/make_row_templates.py [--templates templates]`` (a second; the same files every time).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from make_quickstart_models import INSTRUCTION, dataset_words, pseudo_word

SFT_ROWS, DOCUMENTS = 2048, 320
SEED = 0

KINDS = ("bird", "fish", "lizard", "beetle", "mouse", "deer", "frog", "snail")
COLOURS = ("grey", "brown", "white", "green", "black", "red", "yellow", "blue")
PLACES = (
    "the river",
    "the old forest",
    "the high moor",
    "the salt marsh",
    "the stony coast",
    "the dry hills",
)
FOODS = (
    "seeds",
    "small shells",
    "grass",
    "moss",
    "beetles",
    "soft roots",
    "berries",
    "young leaves",
)
TIMES = (
    "at dawn",
    "at night",
    "in the rain",
    "in early spring",
    "when the wind is still",
    "in the heat of the day",
)
HABITS = (
    "It builds a round nest of {food} and mud.",
    "It is seldom seen {time}.",
    "Two of them share one burrow near {place}.",
    "Its call is low and long, and is heard {time}.",
    "It sleeps under stones and wakes {time}.",
    "The young are {colour}, and live on {food}.",
    "In winter it moves from {place} to {other}.",
    "It carries {food} to {place} and keeps them there.",
)


def entry(rng: random.Random, name: str) -> str:
    """One entry of the guide, of three to nine sentences."""

    def fill(sentence: str) -> str:
        place, other = rng.sample(PLACES, 2)
        return sentence.format(
            food=rng.choice(FOODS),
            time=rng.choice(TIMES),
            place=place,
            other=other,
            colour=rng.choice(COLOURS),
        )

    sentences = [
        f"The {name} is a {rng.choice(COLOURS)} {rng.choice(KINDS)} of {rng.choice(PLACES)}.",
        f"It eats {rng.choice(FOODS)} and {rng.choice(FOODS)}.",
        *map(fill, rng.choices(HABITS, k=rng.randint(1, 7))),
    ]
    return " ".join(sentences)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One row a line."""
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write_sft(path: Path) -> None:
    """Words with their answers."""
    write_rows(
        path,
        (
            {
                "messages": [
                    {"role": "user", "content": INSTRUCTION + word},
                    {"role": "assistant", "content": word[::-1]},
                ],
                "rewards": ["accuracy"],
                "metadata": {"answer": word[::-1]},
            }
            for word in dataset_words(SEED)[:SFT_ROWS]
        ),
    )


def write_posttrain(path: Path) -> None:
    """Entries of the guide."""
    rng = random.Random(f"{SEED}/guide")
    write_rows(path, ({"text": entry(rng, pseudo_word(rng))} for _ in range(DOCUMENTS)))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description="Make the data of templates/sft and templates/posttrain."
    )
    parser.add_argument("--templates", type=Path, default=Path("templates"))
    folder = parser.parse_args().templates
    write_sft(folder / "sft" / "train.jsonl")
    write_posttrain(folder / "posttrain" / "train.jsonl")


if __name__ == "__main__":
    main()
