"""Make what ``templates/quickstart`` ships: a tokenizer, a tiny teacher, a tiny student, and ``train.jsonl``.

The task is to reverse a word (``Reverse: planet`` -> ``tenalp``). Every letter of the answer can be read off the prompt,
so one wrong letter does not derail the rest, and the answer can be checked.

How the two models differ, and why:

- The **teacher** (3 layers) is trained on clean answers. Its *inputs* are damaged: some letters of the answer so far
  are replaced, and sometimes the answer runs past its end, while the targets stay right. It therefore goes on
  correctly after a mistake, which is what scoring a student's own text needs: a teacher that never saw mistakes gives
  noise after the first one.
- The **student** (2 layers) is trained on answers in which each letter is replaced, with probability ``--slip-rate``,
  by the letter before or after it: ``tenalp`` may read ``tennlp``. It learns to reverse and to slip at that rate, so
  at temperature 1 it gets about half of the words right (greedy decoding, which hides slips, already gets nearly all).
  Distillation has to take the slips out. A student without any probability on the right letter would learn nothing:
  reverse KL on its own samples only shifts weight among letters that it does write.

Both share one byte-level tokenizer (one token per byte of UTF-8, so any text encodes) and one chat template.
Embeddings are tied to the head and start larger than usual (``tiny_models.build_model`` says why).

Words in ``train.jsonl`` appear in neither model's training. The same seed gives the same files on the same machine
and the same torch version; across machines float arithmetic differs. Accuracies are printed for the weights as
shipped, rounded to bfloat16.

Usage: ``python scripts/make_quickstart_models.py [--out templates/quickstart] [--seed 0]`` (about five minutes).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tiny_models import build_model, byte_alphabet, padded, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

log = logging.getLogger("make_quickstart_models")

INSTRUCTION = "Reverse: "
MIN_LETTERS, MAX_LETTERS = 5, 10
ROWS = 4096
ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gr pl pr sh sk sl sp st th tr"
VOWELS = "a e i o u a e i o ai ea ee oo ou"
CODAS = "l m n r s t x ck ld lm nd ng nt rd rk rm rn sk st"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

PAD_TOKEN, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- raise_exception('This chat template has no tool calls.') }}
    {%- endif %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}
            {{- '' + part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: the id of a byte is its value, special tokens follow."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([PAD_TOKEN, END_OF_TURN, *ROLE_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- words --------------------------------------------------------------------------------------------------------


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word of 5 to 10 letters, such as ``planet`` or ``brimosket``."""
    onsets, vowels, codas = ONSETS.split(), VOWELS.split(), ["", "", "", *CODAS.split()]
    target = rng.randint(MIN_LETTERS, MAX_LETTERS)
    while True:
        word = ""
        while len(word) < target:
            word += rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)
        if len(word) == target:
            return word


def random_letters(rng: random.Random) -> str:
    """Any 5 to 10 letters: keeps the models from relying on what words usually look like."""
    return "".join(rng.choices(LETTERS, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))


def dataset_words(seed: int) -> list[str]:
    """The distinct words of train.jsonl, palindromes left out."""
    rng = random.Random(f"{seed}/dataset")
    words: dict[str, None] = {}
    while len(words) < ROWS:
        word = pseudo_word(rng)
        if word != word[::-1]:
            words[word] = None
    return list(words)


def write_dataset(path: Path, words: Sequence[str]) -> None:
    """One row per word, in the hosted train.jsonl format."""
    rows = (
        {
            "messages": [{"role": "user", "content": INSTRUCTION + word}],
            "rewards": ["accuracy"],
            "metadata": {"answer": word[::-1]},
        }
        for word in words
    )
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


# --- training -----------------------------------------------------------------------------------------------------


class Encoder:
    """Turns words into the token ids that the chat template would give (checked once), fast.

    ``question`` makes a word what the user says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        question: Callable[[str], str] = (INSTRUCTION + "{}").format,
    ) -> None:
        self.question = question
        self.end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        self.after = [self.end, *b"\n", assistant]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": question("planet")}],
            add_generation_prompt=True,
            return_dict=False,
        )
        if self.prompt("planet") != expected:
            raise RuntimeError(
                f"the chat template gives {expected}, the encoder {self.prompt('planet')}"
            )

    def prompt(self, word: str) -> list[int]:
        """Ids of the rendered prompt, ready for the answer."""
        return self.ask(self.question(word))

    def ask(self, text: str) -> list[int]:
        """The same of any text."""
        return [self.user, *text.encode(), *self.after]


def slip(letters: Sequence[int], rate: float, rng: random.Random) -> list[int]:
    """Each letter replaced by the one before or after it with probability ``rate``."""
    written = list(letters)
    for index in range(len(letters)):
        if rng.random() < rate:
            written[index] = letters[
                rng.choice([i for i in (index - 1, index + 1) if 0 <= i < len(letters)])
            ]
    return written


def scramble(letters: Sequence[int], rate: float, rng: random.Random) -> list[int]:
    """Each letter replaced by any letter with probability ``rate``."""
    alphabet = LETTERS.encode()
    return [rng.choice(alphabet) if rng.random() < rate else letter for letter in letters]


def slipping_answer(
    answer: list[int], end: int, rate: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """(inputs, targets) of the student: the slips are in both, as in a text written by someone careless."""
    written = slip(answer, rate, rng)
    return written, [*written, end]


def corrected_answer(
    answer: list[int], end: int, rate: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """(inputs, targets) of the teacher: what was written so far is damaged, what comes next is right."""
    written, targets = rng.choice((slip, scramble))(answer, rate, rng), [*answer, end]
    if rng.random() < rate:  # whoever missed the end should stop now
        extra = rng.randint(1, 2)
        written += rng.choices(LETTERS.encode(), k=extra)
        targets += [end] * extra
    return written, targets


def batches(
    encoder: Encoder,
    *,
    teacher: bool,
    slip_rate: float,
    size: int,
    excluded: set[str],
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), both [size, T]; -100 where nothing is predicted. Fresh words every time."""
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < size:
            word = pseudo_word(rng) if rng.random() < 0.5 else random_letters(rng)
            if word in excluded:
                continue
            prompt, answer = encoder.prompt(word), list(word[::-1].encode())
            rate = rng.choice((0.0, 0.1, 0.3)) if teacher else slip_rate
            written, targets = (corrected_answer if teacher else slipping_answer)(
                answer, encoder.end, rate, rng
            )
            rows.append((prompt + written, [-100] * (len(prompt) - 1) + targets))
        yield padded(rows, encoder.pad)


# --- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM,
    encoder: Encoder,
    words: Sequence[str],
    *,
    temperature: float,
    seed: int,
) -> float:
    """Share of ``words`` reversed exactly, one sample each; temperature 0 is greedy."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for length in sorted({len(word) for word in words}):  # equal lengths need no padding
        group = [word for word in words if len(word) == length]
        ids, cache, written = torch.tensor([encoder.prompt(word) for word in group]), None, []
        for _ in range(length + 1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            if temperature:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                ids = logits.argmax(-1, keepdim=True)
            written.append(ids)
        for word, answer in zip(group, torch.cat(written, dim=1).tolist(), strict=True):
            right += answer == [*word[::-1].encode(), encoder.end]
    return right / len(words)


def parse_arguments() -> argparse.Namespace:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description="Make the models and the data of templates/quickstart."
    )
    parser.add_argument("--out", type=Path, default=root / "templates" / "quickstart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--student-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--slip-rate", type=float, default=0.09, help="per letter, in the student's targets"
    )
    return parser.parse_args()


def main() -> None:
    """Write the tokenizer, both models and train.jsonl, and print how good the models are."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    tokenizer, words = build_tokenizer(), dataset_words(arguments.seed)
    encoder, excluded = Encoder(tokenizer), set(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_dataset(arguments.out / "train.jsonl", words)

    for offset, (name, layers, steps) in enumerate(
        (("teacher", 3, arguments.teacher_steps), ("student", 2, arguments.student_steps))
    ):
        model = build_model(tokenizer, layers=layers, seed=arguments.seed + offset)
        data = batches(
            encoder,
            teacher=name == "teacher",
            slip_rate=arguments.slip_rate,
            size=arguments.batch_size,
            excluded=excluded,
            rng=random.Random(f"{arguments.seed}/{name}"),
        )
        train(model, data, name=name, steps=steps, learning_rate=arguments.learning_rate)
        folder = arguments.out / name
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shipped = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for temperature in (0.0, 1.0):
            share = accuracy(shipped, encoder, words, temperature=temperature, seed=arguments.seed)
            log.info(
                "%s: accuracy %.3f at temperature %.0f (%d unseen words)",
                name,
                share,
                temperature,
                len(words),
            )


if __name__ == "__main__":
    main()
