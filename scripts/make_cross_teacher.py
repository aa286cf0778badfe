"""Make a teacher for the quickstart's student that reads with another tokenizer: ``teacher.tokenizer: cross``.

It reverses words as the quickstart's own teacher does, but its tokens are letters and frequent pairs of letters, its ids and
control tokens are others, and so is its chat template. At each end of a token of what was written so far, slips included, it
learns to go on with the right letters.

Usage: ``python scripts/make_cross_teacher.py --out teacher-cross [--seed 0]`` (about three minutes).
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from make_quickstart_models import (
    INSTRUCTION,
    LETTERS,
    dataset_words,
    pseudo_word,
    random_letters,
    scramble,
    slip,
)
from tiny_models import build_model, byte_alphabet, padded, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

log = logging.getLogger("make_cross_teacher")

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ASKED, ANSWERED = "[Q]", "[A]"
CHAT_TEMPLATE = """\
{{- '<s>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[Q] ' + message.content + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '[A]' + message.content + '</s>' }}
    {%- else %}
        {{- raise_exception('Only user and assistant can speak, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[A]' }}
{%- endif %}"""


def build_tokenizer(words: Sequence[str], pairs: int) -> PreTrainedTokenizerFast:
    """Control tokens first, then bytes, then the ``pairs`` pairs of letters that are most frequent in ``words``, read in
    either direction."""
    alphabet = byte_alphabet()
    texts = [text for word in words for text in (word, word[::-1])]
    counted = Counter(a + b for text in texts for a, b in pairwise(text))
    merged = [pair for pair, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    controls = [PAD, EOS, BOS, ASKED, ANSWERED]
    pieces = [*controls, *alphabet, *merged[:pairs]]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[(pair[0], pair[1]) for pair in merged[:pairs]],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        bos_token=BOS,
        pad_token=PAD,
        additional_special_tokens=[ASKED, ANSWERED],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Examples:
    """What the teacher learns from, in its own tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.end, self.pad = tokenizer.convert_tokens_to_ids([EOS, PAD])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, word: str) -> list[int]:
        """Ids of the rendered prompt, ready for the answer."""
        return self.encode(f"{BOS}{ASKED} {INSTRUCTION}{word}\n{ANSWERED}")

    def row(self, word: str, rate: float, rng: random.Random) -> tuple[list[int], list[int]]:
        """(ids, labels): an answer with slips at ``rate`` per letter, and what is right after each of its tokens."""
        prompt, answer = self.prompt(word), word[::-1]
        damage = rng.choice((slip, scramble))
        written = bytes(damage([*answer.encode()], rate, rng)).decode()
        if rng.random() < rate:  # whoever missed the end should stop now
            written += "".join(rng.choices(LETTERS, k=rng.randint(1, 2)))
        ids = self.encode(written)
        if written == answer:
            targets = [*ids, self.end]
        else:
            ends = accumulate((len(self._tokenizer.decode([token])) for token in ids), initial=0)
            targets = [self.encode(answer[end:])[0] if answer[end:] else self.end for end in ends]
        return prompt + ids, [-100] * (len(prompt) - 1) + targets

    def batches(
        self, size: int, excluded: set[str], rng: random.Random
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (ids, labels), both [size, T]; -100 where nothing is predicted. Fresh words every time."""
        while True:
            rows = []
            while len(rows) < size:
                word = pseudo_word(rng) if rng.random() < 0.5 else random_letters(rng)
                if word not in excluded:
                    rows.append(self.row(word, rng.choice((0.0, 0.1, 0.3)), rng))
            yield padded(rows, self.pad)


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, examples: Examples, words: Sequence[str]) -> float:
    """Share of ``words`` whose right answer is the likeliest at every token."""
    model.eval()
    right = 0
    for word in words:
        prompt, answer = examples.prompt(word), [*examples.encode(word[::-1]), examples.end]
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(words)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a quickstart teacher of another tokenizer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--pairs", type=int, default=48, help="tokens of two letters")
    return parser.parse_args()


def main() -> None:
    """Write tokenizer and model, and print how good the model is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    words = dataset_words(arguments.seed)
    tokenizer = build_tokenizer(words, arguments.pairs)
    examples = Examples(tokenizer)
    model = build_model(tokenizer, layers=3, seed=arguments.seed)
    rng = random.Random(f"{arguments.seed}/cross")
    train(
        model,
        examples.batches(arguments.batch_size, set(words), rng),
        name="teacher",
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    shipped = Qwen3ForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    log.info("right at every token: %.3f of 512 words", accuracy(shipped, examples, words[:512]))


if __name__ == "__main__":
    main()
