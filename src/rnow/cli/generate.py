"""`rnow generate`: a teacher's answers as training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.options import Folder, Overrides, load, placed

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        "-t",
        help="A HuggingFace id or a folder: answers here (sampler.backend: transformers or vllm).",
        metavar="PATH",
        show_default="teacher.path of a distill project",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="An OpenAI-compatible endpoint, up to /v1; answers instead.",
        metavar="URL",
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The model's name at the endpoint.",
        metavar="NAME",
        show_default="the only one that it serves",
    ),
]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Name of the variable, in .env or exported, that holds the endpoint's key.",
        metavar="VARIABLE",
        show_default="RNOW_TEACHER_API_KEY; OPENAI_API_KEY at OpenAI",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "-p",
        help="What is asked: a file, or a dataset's id.",
        metavar="FILE",
        show_default="prompts.jsonl",
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Where the rows go.", metavar="FILE")]
Samples = Annotated[int, typer.Option("-n", "--samples", min=1, help="Answers to each prompt.")]
KeepIf = Annotated[
    str | None,
    typer.Option(
        "--keep-if",
        help='Which answers become rows: "reward>=1", "accuracy>=1 and tokens<2000". Names: reward (all of a row\'s '
        "together), each reward, tokens, turns.",
        metavar="CONDITIONS",
        show_default="all",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")
]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        "-c",
        min=1,
        help="Conversations at once.",
        show_default="16 with an endpoint, 256 here",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        help="Of the answers.",
        show_default="the endpoint's own; rollout.temperature here",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        help="Stop before more tokens are read and written in all, earlier calls included. "
        "(One answer: rollout.max_tokens.)",
        show_default="no limit",
    ),
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        min=0.0,
        help="The same in money; needs both prices.",
        show_default="no limit",
    ),
]
PriceIn = Annotated[
    float | None,
    typer.Option("--price-in", min=0.0, help="Of a million tokens that the teacher reads."),
]
PriceOut = Annotated[
    float | None,
    typer.Option("--price-out", min=0.0, help="Of a million tokens that it writes."),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=1.0, help="Seconds until a request is given up, retries included."
    ),
]
Thinking = Annotated[
    bool,
    typer.Option(
        "--thinking/--no-thinking",
        help="Keep what an endpoint gives apart as reasoning, in <think> before the answer.",
    ),
]
Rescore = Annotated[
    bool, typer.Option("--rescore", help="Run all rewards again on the answers that are there.")
]


def generate_rows(
    overrides: Overrides = None,
    folder: Folder = Path(),
    teacher: Teacher = None,
    url: Url = None,
    model: ServedModel = None,
    key: KeyVariable = None,
    prompts: Prompts = None,
    output: Output = "train.jsonl",
    samples: Samples = 1,
    keep_if: KeepIf = None,
    limit: Limit = None,
    at_once: AtOnce = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    timeout: Timeout = 600.0,
    thinking: Thinking = True,
    rescore: Rescore = False,
) -> None:
    """Let a teacher answer prompts, and write its answers as training data. Called again, it asks what is missing."""
    loaded = load(folder, overrides)

    from rnow.cli.output import console, settle
    from rnow.setup.generation import Wanted, generate

    wanted = Wanted(
        teacher=teacher,
        url=url,
        model=model,
        key_variable=key,
        prompts=prompts,
        output=output,
        samples=samples,
        keep_if=keep_if,
        limit=limit,
        at_once=at_once,
        temperature=temperature,
        max_tokens=max_tokens,
        max_cost=max_cost,
        price_in=price_in,
        price_out=price_out,
        timeout=timeout,
        thinking=thinking,
        rescore=rescore,
    )
    shown_on = console(aside=True)  # a terminal that takes nothing must not make paid answers late
    try:
        with placed(loaded):
            generate(loaded.config, wanted, folder=folder, console=shown_on)
    finally:
        settle(shown_on)
