"""Make what ``templates/tool-quickstart`` ships: a tokenizer, a tiny teacher, a tiny student, and ``train.jsonl``.

The task is a sum of three numbers with a pocket calculator: ``Compute 37+58-12.`` takes two calls, ``calc("37+58")``,
then ``calc("95-12")`` with the result that came back, then the answer ``83``. The models never calculate; they choose
what to do next and copy digits, which a model of 200,000 weights can do.

How the two models differ, and why:

- The **student** (2 layers) is trained on careless conversations: a digit becomes the digit beside it, a sign flips, the
  first result is given as the answer, a third call is made, a call stops after its sign (and the calculator objects).
  It learns to do all this at the rates of ``Rates``, so at temperature 1 it gets about half of the answers right.
- The **teacher** (3 layers) is trained on conversations that are at least as careless, but the target at every position
  is what should have been written there, given all that stands before. It therefore goes on sensibly after a mistake:
  the result of a wrong call is used like any other, a call that failed is made again, an answer given too early is
  finished. That is what scoring a student's own text needs; the first token that goes astray carries the blame.

Calls of the training conversations run through the template's own ``tools.py``, so a wrong call has its real result.

The tokenizer is byte-level (any text encodes), with merges learned from conversations like these in which digits and
signs stay apart: the schema of the tool and the JSON around a call take a few tokens each. Token ids of training data
are put together from pieces that the package's own rendering gave, so they are those of a rollout.

Questions in ``train.jsonl`` appear in neither model's training. The same seed gives the same files on the same machine
and the same torch version; across machines float arithmetic differs. Accuracies are printed for the weights as
shipped, rounded to bfloat16.

Usage: ``python scripts/make_tool_quickstart_models.py [--out templates/tool-quickstart] [--seed 0]``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import build_model, byte_alphabet, padded, train
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rnow.core import get_response
from rnow.core.tool_schema import describe
from rnow.models.loading import load_causal_lm
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.rollout.environment import Dialogue, ToolEnvironment
from rnow.rollout.rendering import render_text
from rnow.sampling.transformers import TransformersSampler
from rnow.types import Prompt, ToolCall, ToolResult

log = logging.getLogger("make_tool_quickstart_models")

TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "tool-quickstart"
ROWS = 2048
SIGNS = "+-"
WIDTH = 64
MAX_TURNS, MAX_TOKENS = 6, 32
POOL = 16  # batches that are drawn together
# What the student reads after a call that failed; the first is what a call gets that stops too early.
ERRORS = (
    "Error: ValueError: write one operation on two whole numbers, such as 12+34",
    "Error: ValueError: division by zero",
    "Error: the call could not be read",
)

PAD_TOKEN, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, END_OF_TURN, "<|im_start|>")
# As in Qwen3, these are added tokens but not special ones: they are part of what a decoded turn says.
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHAT_TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content or [] %}
            {{- '' + part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- text(messages[0].content) + '\\n' }}
    {%- endif %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- (tool.function or tool) | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'tool' %}
            {{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' }}
        {%- else %}
            {{- text(message.content) }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def load_calc() -> Callable[[str], str]:
    """The calculator of the template's tools.py."""
    return runpy.run_path(str(TEMPLATE / "tools.py"))["calc"]


def describe_calc(calc: Callable[[str], str]) -> dict[str, Any]:
    """The calculator as the chat template is told of it."""
    signature = describe(calc)
    return {
        "type": "function",
        "function": {
            "name": "calc",
            "description": signature.description,
            "parameters": dict(signature.parameters),
        },
    }


# --- the task -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """``first sign second sign third``, worked out from left to right."""

    numbers: tuple[int, int, int]
    signs: str

    @classmethod
    def draw(cls, rng: random.Random) -> Problem:
        """Three numbers of two digits and two signs."""
        return cls(
            (rng.randint(10, 99), rng.randint(10, 99), rng.randint(10, 99)),
            rng.choice(SIGNS) + rng.choice(SIGNS),
        )

    @property
    def sums(self) -> str:
        """What is to be worked out."""
        first, second, third = self.numbers
        return f"{first}{self.signs[0]}{second}{self.signs[1]}{third}"

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"Compute {self.sums}."

    def expression(self, call: int, result: str) -> str:
        """The expression of call 0, or of call 1 (and of any later one) after ``result``."""
        first, second, third = self.numbers
        return f"{first}{self.signs[0]}{second}" if call == 0 else f"{result}{self.signs[1]}{third}"

    @property
    def answer(self) -> str:
        """What the user should hear."""
        first, second, third = self.numbers
        partial = first + second if self.signs[0] == "+" else first - second
        return str(partial + third if self.signs[1] == "+" else partial - third)


def dataset(seed: int) -> list[Problem]:
    """The distinct problems of train.jsonl."""
    rng = random.Random(f"{seed}/dataset")
    problems: dict[Problem, None] = {}
    while len(problems) < ROWS:
        problems[Problem.draw(rng)] = None
    return list(problems)


def write_dataset(path: Path, problems: Sequence[Problem]) -> None:
    """One row per problem, in the hosted train.jsonl format."""
    rows = (
        {
            "messages": [{"role": "user", "content": problem.question}],
            "rewards": ["accuracy"],
            "metadata": {"answer": problem.answer},
        }
        for problem in problems
    )
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


# --- text to ids --------------------------------------------------------------------------------------------------


def call_message(expression: str) -> dict[str, Any]:
    """An assistant message that calls the calculator."""
    function = {"name": "calc", "arguments": {"expression": expression}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


def build_tokenizer(tool: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Bytes, and merges that make one token of every word of a conversation like ours. Digits and signs stay apart, and
    no token reaches over a space: what a call is made of can be told from its tokens."""
    alphabet = byte_alphabet()
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r"[^\n0-9+*/-]+|\n|[0-9+*/-]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    conversation = [
        {"role": "user", "content": Problem((10, 10, 10), "++").question},
        call_message("10+10"),
        *({"role": "tool", "content": text} for text in ("20", *ERRORS)),
    ]
    text = _wrapped(backend).apply_chat_template(
        conversation, tools=[tool], tokenize=False, add_generation_prompt=True
    )
    marks = "|".join(map(re.escape, (*SPECIAL_TOKENS, *MARKS)))
    backend.train_from_iterator(
        re.split(marks, text),
        trainers.BpeTrainer(
            vocab_size=2**16, min_frequency=0, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        + [AddedToken(token, special=False, normalized=False) for token in MARKS]
    )
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Encoder:
    """Token ids of conversations, put together from pieces that the package's rendering gave once, fast."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tool: dict[str, Any]) -> None:
        self.end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.dialogue = Dialogue(tokenizer, [tool], stop_token_ids=[self.end, self.pad])
        self.vocabulary = len(tokenizer)
        self._tokenizer, self.tool = tokenizer, tool
        rendered = render_text(tokenizer, [call_message("7")], generation_prompt=False)
        turn = rendered.partition("assistant\n")[2].partition(END_OF_TURN)[0]
        self._call = self._around(self.ids(turn), "7")
        self._observation = self._around(self.rendered_observation("7"), "7")
        sums = "12+34-56"
        self._prompt = self._around(self.rendered_prompt(f"Compute {sums}."), sums)

    def ids(self, text: str) -> list[int]:
        """Ids of any text."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def rendered_prompt(self, question: str) -> list[int]:
        """What a rollout starts with."""
        messages = [{"role": "user", "content": question}]
        return self.ids(render_text(self._tokenizer, messages, tools=[self.tool]))

    def rendered_observation(self, result: str) -> list[int]:
        """What a rollout appends after a call with this result."""
        message = {"role": "tool", "name": "calc", "tool_call_id": "1", "content": result}
        return list(self.dialogue.observations.after_tools([message], self.end))

    def prompt(self, problem: Problem) -> list[int]:
        """``rendered_prompt`` of the problem's question."""
        before, after = self._prompt
        return [*before, *self.ids(problem.sums), *after]

    def observation(self, result: str) -> list[int]:
        """``rendered_observation``."""
        before, after = self._observation
        return [*before, *self.ids(result), *after]

    def call(self, expression: str) -> list[int]:
        """A turn that calls the calculator, end of turn included."""
        before, after = self._call
        return [*before, *self.ids(expression), *after, self.end]

    def answer(self, text: str) -> list[int]:
        """A turn that answers, end of turn included."""
        return [*self.ids(text), self.end]

    def _around(self, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        """What stands before and after the last ``text`` in ``ids``."""
        inner = self.ids(text)
        start = max(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
        return ids[:start], ids[start + len(inner) :]


# --- careless conversations ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """How often something goes wrong: per digit, per sign, per chance to stop early or call again, per call."""

    digit: float
    sign: float
    early: float
    again: float
    broken: float

    @classmethod
    def of_teacher(cls, rng: random.Random) -> Rates:
        """Damage for one conversation of the teacher's: none, or a good deal."""
        if rng.random() < 0.4:
            return cls(0, 0, 0, 0, 0)
        return cls(rng.choice((0.05, 0.3)), 0.1, 0.1, 0.1, 0.1)


def slip(text: str, rates: Rates, rng: random.Random, *, anything: bool) -> str:
    """``text`` with slips: a digit becomes the one beside it in its number (``anything``: any digit), a sign flips.

    The leading sign of a number, unlike one between two numbers, stays.
    """
    written = list(text)
    for index, character in enumerate(text):
        if character.isdigit() and rng.random() < rates.digit:
            beside = [text[i] for i in (index - 1, index + 1) if text[i : i + 1].isdigit()]
            choices = "0123456789" if anything else beside
            if choices:
                written[index] = rng.choice(choices)
        elif character in SIGNS and index and rng.random() < rates.sign:
            written[index] = "+" if character == "-" else "-"
    return "".join(written)


def conversation(
    problem: Problem,
    encoder: Encoder,
    calc: Callable[[str], str],
    rates: Rates,
    rng: random.Random,
    *,
    corrected: bool,
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a careless conversation; labels stand where they are predicted.

    Labels are what was written, or with ``corrected`` what should have been written at each position.
    """
    tokens = encoder.prompt(problem)
    targets = [-100] * len(tokens)
    anything = corrected and rng.random() < 0.5
    due, result = 0, ""  # call 0, call 1, then 2: the answer
    for _ in range(MAX_TURNS):
        action = due
        if due == 1 and rng.random() < rates.early:
            action = 2
        elif due == 2 and rng.random() < rates.again:
            action = 1
        meant = problem.expression(action, result) if action < 2 else result
        text = slip(meant, rates, rng, anything=anything)
        wrap = encoder.call if action < 2 else encoder.answer
        wanted, written = wrap(meant), wrap(text)
        if action < 2 and rng.random() < rates.broken:
            sign = next(i for i, c in enumerate(text) if i and c in SIGNS)
            text = text[: sign + 1]
            # The token after the sign should have been a digit; what closes the call is right from there on.
            cut = wrap(meant[: sign + 1])
            at = next(i for i, (a, b) in enumerate(zip(cut, wanted, strict=False)) if a != b)
            cut[at] = wanted[at]
            wanted, written = cut, wrap(text)
        if action != due:
            right = encoder.call("") if due < 2 else encoder.answer(result)
            wanted[0] = right[0]
        tokens += written
        targets += wanted if corrected else written
        if action == 2:
            break
        try:
            result = observed = calc(text)
            due = min(due + 1, 2)
        except ValueError:
            observed = rng.choice(ERRORS)
        observation = encoder.observation(observed)
        tokens += observation
        targets += [-100] * len(observation)
    return tokens[:-1], targets[1:]


def batches(
    encoder: Encoder,
    calc: Callable[[str], str],
    *,
    rates: Rates | None,
    size: int,
    excluded: set[Problem],
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), both [size, T]; without ``rates`` they are the teacher's. Fresh problems every time.

    Conversations of like length share a batch: else the few long ones would double the work.
    """
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < POOL * size:
            problem = Problem.draw(rng)
            if problem not in excluded:
                chosen = rates or Rates.of_teacher(rng)
                rows.append(
                    conversation(problem, encoder, calc, chosen, rng, corrected=rates is None)
                )
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        for start in starts:
            yield padded(rows[start : start + size], encoder.pad)


STUDENT_RATES = Rates(digit=0.05, sign=0.03, early=0.1, again=0.04, broken=0.04)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """Shares of rollouts: with the right answer, and with any answer at all."""

    right: float
    answered: float


def measure(
    folder: Path,
    encoder: Encoder,
    calc: Callable[[str], str],
    problems: Sequence[Problem],
    *,
    temperature: float,
    seed: int,
) -> Measured:
    """One rollout per problem with a saved model, by the package's own sampler and environment; temperature 0 is greedy."""

    async def run_call(call: ToolCall) -> ToolResult:
        try:
            return ToolResult(content=calc(call.arguments["expression"]))
        except ValueError as error:
            return ToolResult(content=f"Error: ValueError: {error}", failed=True)

    prompts = [
        Prompt(id=str(row), dataset="dataset_0", row=row, messages=())
        for row in range(len(problems))
    ]
    settings = RolloutSettings(
        group_size=1,
        window=512,
        max_tokens=MAX_TOKENS,
        stop_token_ids=(encoder.end, encoder.pad),
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        run_seed=seed,
        purpose="eval",
    )
    lm = load_causal_lm(
        folder,
        vocabulary=encoder.vocabulary,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    groups = asyncio.run(
        collect_rollouts(
            prompts,
            TransformersSampler(lm, mode=None),
            lambda prompt, index: ToolEnvironment(
                tuple(encoder.prompt(problems[prompt.row])),
                encoder.dialogue,
                run_call,
                max_turns=MAX_TURNS,
            ),
            settings,
            step=0,
        )
    )
    answers = [
        get_response(rollout.messages) if rollout.end_reason == "answer" else None
        for group in groups
        for rollout in group.rollouts
    ]
    right = sum(answer == problem.answer for answer, problem in zip(answers, problems, strict=True))
    return Measured(right / len(answers), 1 - answers.count(None) / len(answers))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make the models and the data of templates/tool-quickstart."
    )
    parser.add_argument("--out", type=Path, default=TEMPLATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teacher-steps", type=int, default=1300)
    parser.add_argument("--student-steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    calc, problems = load_calc(), dataset(arguments.seed)
    tool = describe_calc(calc)
    tokenizer = build_tokenizer(tool)
    encoder, excluded = Encoder(tokenizer, tool), set(problems)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_dataset(arguments.out / "train.jsonl", problems)

    for offset, (name, layers, steps, rates) in enumerate(
        (
            ("teacher", 3, arguments.teacher_steps, None),
            ("student", 2, arguments.student_steps, STUDENT_RATES),
        )
    ):
        model = build_model(tokenizer, layers=layers, seed=arguments.seed + offset, width=WIDTH)
        data = batches(
            encoder,
            calc,
            rates=rates,
            size=arguments.batch_size,
            excluded=excluded,
            rng=random.Random(f"{arguments.seed}/{name}"),
        )
        train(model, data, name=name, steps=steps, learning_rate=arguments.learning_rate)
        folder = arguments.out / name
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for temperature in (0.0, 1.0):
            share = measure(
                folder, encoder, calc, problems, temperature=temperature, seed=arguments.seed
            )
            log.info(
                "%s: %.3f right, %.3f answered at temperature %.0f (%d unseen problems)",
                name,
                share.right,
                share.answered,
                temperature,
                len(problems),
            )


if __name__ == "__main__":
    main()
