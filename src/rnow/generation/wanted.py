"""What a call of ``rnow generate`` was asked for, and whether it can be done; nothing is loaded or asked yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rnow.config import Config
from rnow.config.schema import DatasetSource, ModelSection, TeacherSection
from rnow.errors import DataError, InputError, ModelError
from rnow.generation.budget import Prices
from rnow.generation.keep import Condition, read_conditions
from rnow.generation.store import answers_path, prompt_key
from rnow.models.ids import check_model_id
from rnow.plan.prepare import Prepared
from rnow.project.dataset import place_of as row_place
from rnow.serving.chat import check_address
from rnow.text.strict_json import mend_surrogates
from rnow.text.user_files import place_of
from rnow.types import Prompt

PROMPTS = "prompts.jsonl"
AT_ONCE, AT_ONCE_HERE = 16, 256
"""Conversations at once: with an endpoint, and with a model that runs here."""
_KEPT_OF_MODEL = ("device", "dtype", "quantization", "attn_implementation", "trust_remote_code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be generated, and by whom: the options of ``rnow generate``.

    Attributes:
        teacher: a HuggingFace id, a folder, or a run's folder, to run here; or
        url, model: an OpenAI-compatible endpoint up to ``/v1``, and the model's name there.
        key_variable: the environment variable, or name in ``.env``, that holds its key.
        prompts: a file, or whatever ``data.train_file`` may name; None: ``prompts.jsonl``, else what a distill or rl project
            trains on.
        output: of the rows.
        samples: answers to each prompt.
        keep_if: conditions, see ``read_conditions``; None keeps all that can be a row.
        limit: only the first so many prompts.
        at_once: conversations at once; None: ``AT_ONCE`` or ``AT_ONCE_HERE``.
        temperature: None: what the endpoint likes, or ``rollout.temperature`` for a model that runs here.
        max_tokens, max_cost: of all answers together, those of earlier calls included. Never crossed.
        price_in, price_out: of a million tokens read and written; both or none.
        timeout: seconds until a request is given up, its retries included.
        thinking: keep what an endpoint gives apart from its answers as thinking.
        rescore: run all rewards again on the answers that are there.
    """

    teacher: str | None = None
    url: str | None = None
    model: str | None = None
    key_variable: str | None = None
    prompts: str | None = None
    output: str = "train.jsonl"
    samples: int = 1
    keep_if: str | None = None
    limit: int | None = None
    at_once: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    timeout: float = 600.0
    thinking: bool = True
    rescore: bool = False

    @property
    def prices(self) -> Prices | None:
        """Of a million tokens; None where nobody said."""
        if self.price_in is None or self.price_out is None:
            return None
        return Prices(prompt=self.price_in, completion=self.price_out)


def check_teacher(config: Config, wanted: Wanted, folder: Path) -> str:
    """The teacher's name, as rows have it; of an endpoint "" where only that knows.

    Raises:
        InputError: options that exclude each other, or no teacher.
    """
    _refuse_odd(wanted)
    if wanted.url is not None and wanted.teacher is not None:
        raise InputError(
            "--teacher and --url both say who answers",
            why="--teacher names a model to run here, --url an endpoint",
            fix="give one of them; the endpoint's model is --model NAME",
        )
    for option, given in (("--model", wanted.model), ("--key", wanted.key_variable)):
        if given is not None and wanted.url is None:
            raise InputError(f"{option} belongs to an endpoint", fix="give its --url too")
    if (wanted.price_in is None) != (wanted.price_out is None):
        other = "--price-in" if wanted.price_in is None else "--price-out"
        raise InputError(
            "one of the two prices is missing", fix=f"give {other} too; 0 if it is free"
        )
    if wanted.max_cost is not None and (wanted.prices is None or wanted.url is None):
        raise InputError(
            "--max-cost needs prices" if wanted.url else "--max-cost is for endpoints",
            where="--max-cost",
            fix="give --price-in and --price-out, per million tokens"
            if wanted.url
            else "limit a model that runs here with --max-tokens",
        )
    if wanted.temperature == 0 and wanted.samples > 1:
        raise InputError(
            f"{wanted.samples} answers at temperature 0 would be alike",
            where="--temperature",
            fix="raise it, or ask for one answer",
        )
    if wanted.url is not None:
        check_address(wanted.url, where="--url")
        return wanted.model or ""
    name = wanted.teacher or _configured_teacher(config)
    if name is None:
        raise InputError(
            "there is no teacher",
            fix="name one: --teacher PATH to run it here, or --url URL --model NAME for an endpoint",
        )
    try:
        check_model_id(name, key="--teacher", base_dir=folder)
    except ModelError as error:
        raise InputError(
            error.message,
            title=error.title,
            where="--teacher",
            fix="ask its endpoint: --url URL --model NAME; or name a HuggingFace id with open weights",
        ) from None
    return name


def _refuse_odd(wanted: Wanted) -> None:
    """What the command line reads as a text or a number and nobody can use."""
    texts = {
        "--teacher": wanted.teacher,
        "--url": wanted.url,
        "--model": wanted.model,
        "--key": wanted.key_variable,
        "--prompts": wanted.prompts,
        "--output": wanted.output,
    }
    for option, text in texts.items():
        if text is not None and not text.strip():
            raise InputError(
                f"{option} is empty", where=option, fix="give it a value, or leave it out"
            )
        if text is not None and text != mend_surrogates(text):
            raise InputError(f"{option} is no text in UTF-8", where=option, fix="write it as UTF-8")
    numbers = {
        "--temperature": wanted.temperature,
        "--max-cost": wanted.max_cost,
        "--price-in": wanted.price_in,
        "--price-out": wanted.price_out,
        "--timeout": wanted.timeout,
    }
    for option, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise InputError(f"{option} is {number:g}", where=option, fix="give a finite number")


def _configured_teacher(config: Config) -> str | None:
    """The teacher of a distill project, where it is one model."""
    section = config.teacher
    return None if section is None or section.own_base else section.path


def prompts_of(config: Config, wanted: Wanted, folder: Path) -> tuple[DatasetSource, ...]:
    """Where the prompts are read from."""
    if wanted.prompts is not None:
        return (DatasetSource(path=wanted.prompts, name="dataset_0"),)
    if (folder / PROMPTS).exists() or config.dataset_type not in ("distill", "rl"):
        return (DatasetSource(path=PROMPTS, name="dataset_0"),)
    return tuple(source.model_copy(update={"teacher": None}) for source in config.data.sources)


def output_of(wanted: Wanted, folder: Path, sources: Sequence[DatasetSource]) -> Path:
    """Where the rows go.

    Raises:
        InputError: it is no .jsonl file of a folder that is there, or what the prompts are read from.
    """
    path = place_of(wanted.output, folder, where="--output")
    if path.suffix != ".jsonl" or path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"{wanted.output} cannot be the output",
            where="--output",
            why="it is a .jsonl file in a folder that exists",
            fix="name one, e.g. --output train.jsonl",
        )
    written = (path.resolve(), answers_path(path).resolve())
    for source in sources:
        if place_of(source.path, folder, where="--prompts").resolve() in written:
            raise InputError(
                f"{source.path} holds the prompts, and would be written to",
                where="--output",
                fix="write elsewhere, e.g. --output sft.jsonl",
            )
    return path


def as_student(config: Config, sources: tuple[DatasetSource, ...], *, local: str | None) -> Config:
    """The config as for a project whose student is the teacher, and answers these prompts.

    Args:
        local: the model that answers here; None where an endpoint does: then the student stays, as the one who will read, without
            the adapter that it goes on from, which may not be there yet.
    """
    model = config.model.model_copy(update={"adapter": None})
    if local is not None:
        kept = {name: getattr(model, name) for name in _KEPT_OF_MODEL}
        model = ModelSection(path=local, **kept)
    itself = TeacherSection(path=model.path, backend="transformers")
    return config.model_copy(
        update={
            "dataset_type": "distill",
            "model": model,
            "teacher": itself,
            "teachers": dict.fromkeys(config.teachers, itself),
            "data": config.data.model_copy(update={"train_file": sources, "val_split": 0.0}),
            "algorithm": config.algorithm.model_copy(update={"kl_horizon": None}),
            "sampler": config.sampler.model_copy(update={"url": None}),
            "evals": (),
        }
    )


def keyed(prepared: Prepared) -> list[tuple[Prompt, str]]:
    """The prompts in the order of their file, each with its ``prompt_key``."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prepared.project.dataset.prompts:
        plain = prompt_key(prompt)
        found.append((prompt, prompt_key(prompt, seen[plain])))
        seen[plain] += 1
    return found


def conditions_of(wanted: Wanted, prepared: Prepared) -> tuple[Condition, ...]:
    """Those of ``keep_if``. Raises as ``read_conditions``."""
    if wanted.keep_if is None:
        return ()
    return read_conditions(wanted.keep_if, list(prepared.project.rewards))


def refuse_unrewarded(conditions: Sequence[Condition], prompts: Sequence[Prompt]) -> None:
    """
    Raises:
        DataError: a condition asks for a reward, and a prompt names none.
    """
    if not any(condition.of_rewards for condition in conditions):
        return
    for prompt in prompts:
        if not prompt.rewards:
            raise DataError(
                "the row names no reward, and --keep-if asks for one",
                where=row_place(prompt),
                fix='give it "rewards": ["name"], or leave --keep-if out',
            )
