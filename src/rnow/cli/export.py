"""`rnow export`: what a run trained as an adapter, a whole model, a GGUF file, for Ollama, on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from rnow.cli.find import RUNS
from rnow.cli.options import Folder, load
from rnow.cli.serve import Run

_TYPE = re.compile(r"(i?q|tq|f|bf|mxfp)\d\w*", re.IGNORECASE)


Step = Annotated[
    int | None,
    typer.Option("--step", "-s", min=1, help="After which step.", show_default="the last"),
]
Merge = Annotated[
    bool, typer.Option("--merge", help="A whole model, the adapter merged into its base.")
]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Number format of the whole model; auto is the base's own."),
]
Gguf = Annotated[
    str | None,
    typer.Option(
        "--gguf",
        help="A GGUF file by llama.cpp's converter: q8_0 (where no TYPE is given), f16, bf16 or f32.",
        metavar="[TYPE]",
    ),
]
Ollama = Annotated[bool, typer.Option("--ollama", help="A GGUF file and a Modelfile for Ollama.")]
Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        help="Upload what is exported to a repository of the HuggingFace hub.",
        metavar="OWNER/NAME",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where to.",
        show_default="export/ in the run's folder",
        metavar="FOLDER",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Where the base model is.",
        show_default="where the run had it",
        metavar="PATH",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def with_default_type(given: Sequence[str]) -> list[str]:
    """The arguments of a command line, with the type that ``--gguf`` alone stands for: an option's value cannot be left out
    otherwise."""
    if given[:1] != ["export"]:
        return list(given)
    from rnow.export.gguf import DEFAULT_TYPE

    found: list[str] = []
    for argument, following in zip(given, [*given[1:], ""], strict=True):
        found.append(argument)
        if argument == "--gguf" and not _TYPE.fullmatch(following):
            found.append(DEFAULT_TYPE)
    return found


def export_run(
    run: Run,
    folder: Folder = Path(),
    step: Step = None,
    merge: Merge = False,
    dtype: DType = "auto",
    gguf: Gguf = None,
    ollama: Ollama = False,
    push: Push = None,
    private: Private = False,
    output: Output = None,
    base: Base = None,
    force: Force = False,
) -> None:
    """Write what a run trained in a form that others load: the adapter, or with the options a whole model, GGUF, for Ollama."""
    from rnow.config import has_config

    loaded = load(folder, None) if has_config(folder) else None

    from rnow.cli.output import print_lines, print_note, print_warning
    from rnow.setup.export import Wanted, export
    from rnow.setup.subjects import find_trained

    trained = find_trained(
        run,
        folder=folder,
        output_dir=loaded.config.output_dir if loaded else RUNS,
        step=step,
        command="export",
    )
    wanted = Wanted(
        merge=merge,
        dtype=dtype,
        gguf=gguf,
        ollama=ollama,
        push=push,
        private=private,
        output=output,
        base=base,
        force=force,
    )
    export(
        trained,
        wanted,
        folder=folder,
        tell=lambda line: print_lines([line]),
        stage=lambda text: print_note(f"{text} ..."),
        warn=print_warning,
    )
