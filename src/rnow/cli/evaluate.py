"""`rnow eval`: how often the answers of a student, a run or a teacher are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.find import complete_run
from rnow.cli.options import AsJson, Folder, Model, load, placed
from rnow.errors import InputError

LARGEST_K = 1024
_SETTING = re.compile(r"[A-Za-z_][\w.\[\]]*=")
_K = re.compile(r"[0-9]{1,4}")

Given = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SUBJECT]... [KEY=VALUE]...",
        help="student, base, teacher, a run, RUN@STEP or an adapter's folder; and settings that win over config.yml.",
        show_default="student and the project's run",
        autocompletion=complete_run,
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", "-s", min=1, help="Which step of the only run.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "-p",
        help="Rows as train.jsonl has them, instead of the held-out ones.",
        metavar="FILE",
    ),
]
Ks = Annotated[str, typer.Option("--pass", help="Which k of pass@k.", metavar="K,...")]
Temperatures = Annotated[
    str | None,
    typer.Option(
        "--temperature",
        "-t",
        help="For all k, or one for each.",
        metavar="T,...",
        show_default="0.2 for pass@1, 0.6 for pass@4, 0.8 for pass@8",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="Answers per prompt and temperature; at least k are drawn.",
        show_default="evaluation.num_samples",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of the samples.", show_default="the config's"),
]
Most = Annotated[
    int | None,
    typer.Option(
        *("--max-samples", "-n"),
        min=1,
        help="At most so many prompts, the first ones.",
        metavar="N",
        show_default="evaluation.max_prompts; of a file all",
    ),
]
Hosted = Annotated[bool | None, typer.Option(hidden=True)]
"""Flags of the hosted client, which has one for each k."""
Unused = Annotated[str | None, typer.Option(hidden=True)]
Again = Annotated[bool, typer.Option("--again", help="Measure what was measured before, too.")]


def evaluate_subjects(
    given: Given = None,
    folder: Folder = Path(),
    step: Step = None,
    prompts: Prompts = None,
    ks: Ks = "1,4,8",
    temperature: Temperatures = None,
    samples: Samples = None,
    most: Most = None,
    seed: Seed = None,
    model: Model = None,
    again: Again = False,
    as_json: AsJson = False,
    pass1: Hosted = None,
    pass4: Hosted = None,
    pass8: Hosted = None,
    project_id: Unused = None,
    eval_id: Unused = None,
) -> None:
    """Measure pass@k of one or several, with intervals and differences. What was measured before is read back."""
    subjects = [text for text in given or () if not _SETTING.match(text)]
    subjects = subjects or (["student"] if model else [])
    overrides = [text for text in given or () if _SETTING.match(text)]
    if eval_id is not None:
        raise InputError(
            "evaluations have no id here",
            where="--eval-id",
            fix="rnow eval -m MODEL --prompts FILE asks the same prompts again",
        )
    chosen = hosted_ks(pass1, pass4, pass8) or parse_ks(ks)
    temperatures = None if temperature is None else parse_temperatures(temperature, chosen)
    loaded = load(folder, overrides, model=model)

    from rnow.cli.eval_view import eval_view
    from rnow.cli.output import console, print_json
    from rnow.setup.evaluate import Asked, evaluate, hosted_temperatures

    asked = Asked(
        temperatures=dict(sorted((temperatures or hosted_temperatures(chosen)).items())),
        samples=samples,
        most=most,
        prompts=prompts,
        seed=seed,
        again=again,
    )
    out = console()
    with placed(loaded):
        report = evaluate(
            loaded.config,
            subjects,
            folder=folder,
            step=step,
            asked=asked,
            console=console(stderr=True) if as_json else out,
        )
    if as_json:
        print_json(report.to_dict())
        return
    for part in eval_view(report, out):
        out.print(part, highlight=False)


def hosted_ks(pass1: bool | None, pass4: bool | None, pass8: bool | None) -> tuple[int, ...]:
    """The k of ``--pass4 --no-pass1``, as the hosted client takes them: 1 unless it is refused, others where they are asked for.
    Nothing where none of the flags was given.

    Raises:
        InputError: no k is left.
    """
    if pass1 is pass4 is pass8 is None:
        return ()
    wanted = {1: pass1 is not False, 4: pass4, 8: pass8}
    if not (chosen := tuple(k for k, asked in wanted.items() if asked)):
        raise InputError("--no-pass1 leaves nothing to measure", fix="name the k: --pass 1,4,8")
    return chosen


def parse_ks(text: str) -> tuple[int, ...]:
    """``1,4,8`` -> the k of pass@k, as they were written, each once.

    Raises:
        InputError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(_K.fullmatch(part) and 1 <= int(part) <= LARGEST_K for part in parts):
        raise InputError(
            f"--pass {text!r:.60} is not a list of numbers from 1 to {LARGEST_K}",
            fix="write it like --pass 1,4,8",
        )
    return tuple(dict.fromkeys(map(int, parts)))


def parse_temperatures(text: str, ks: Sequence[int]) -> dict[int, float]:
    """``0.7``, or one temperature for each of ``ks`` -> k -> its temperature.

    Raises:
        InputError: something else.
    """
    fix = f"write one for all, or one for each of {', '.join(map(str, ks))}: -t {','.join(['0.7'] * len(ks))}"
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= value <= 1000 for value in found):
        raise InputError(f"-t {text!r:.60} is not a list of temperatures from 0 on", fix=fix)
    if len(found) == 1:
        found *= len(ks)
    if len(found) != len(ks):
        raise InputError(f"-t names {len(found)} temperatures for {len(ks)} k of pass@k", fix=fix)
    return dict(zip(ks, found, strict=True))
