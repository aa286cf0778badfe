"""The options several commands share, and how they become a loaded config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnow.errors import InputError, RnowError
from rnow.text.redact import Redactor
from rnow.text.user_files import place_of

if TYPE_CHECKING:
    from rnow.config import LoadedConfig

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that win over config.yml, e.g. trainer.learning_rate=2e-5",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Option("--dir", "-d", help="The project folder.", metavar="FOLDER")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Sets model.path.", metavar="PATH")
]
Epochs = Annotated[
    str | None, typer.Option("--epochs", "-e", help="Sets trainer.num_epochs.", metavar="N")
]
BatchSize = Annotated[
    str | None, typer.Option("--batch-size", "-b", help="Sets data.batch_size.", metavar="N")
]
LearningRate = Annotated[
    str | None,
    typer.Option("--lr", "--learning-rate", help="Sets trainer.learning_rate.", metavar="RATE"),
]
ContextWindow = Annotated[
    str | None,
    typer.Option("--max-context-window", help="Sets rollout.max_context_window.", metavar="N"),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        "-n",
        help="Name of the run (model.name), e.g. 'lr-{trainer.learning_rate}'.",
        metavar="NAME",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors, and one line with the result, alone."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]


def load(
    folder: Path, overrides: Sequence[str] | None, *, quiet: bool = False, **flags: str | None
) -> LoadedConfig:
    """The project's config with the command line laid over it; warnings and changes are printed to standard error.

    Args:
        folder: the project folder.
        overrides: ``key=value`` settings; they win over flags.
        quiet: print nothing.
        flags: values of shorthand flags by their name in ``rnow.config.SHORTHANDS``, None where not given.

    Raises:
        ConfigError: the config, or a setting, is not valid.
    """
    from rnow.cli.output import hide, print_note, print_warning
    from rnow.config import SHORTHANDS, load_config
    from rnow.project.secrets import load_secrets, writing_redactor

    if (name := flags.get("name")) is not None:
        _check_name(name, overrides or ())
        flags["name"] = json.dumps(name, ensure_ascii=False)  # in quotes it is text: null, [a]
    if place_of(folder, Path(), where="-d, --dir").is_file():
        raise InputError(
            f"{folder} is a file, and -d names the project folder",
            where="-d, --dir",
            fix=f"give the folder, which holds its config as config.yml: -d {folder.parent}",
        )
    secrets = load_secrets(folder)
    hide(Redactor(secrets))
    settings = [f"{SHORTHANDS[name]}={value}" for name, value in flags.items() if value is not None]
    loaded = load_config(folder, [*settings, *(overrides or [])])
    hide(writing_redactor(secrets, loaded.configs[0]))
    if not quiet:
        for line in loaded.warnings:
            print_warning(line)
        for line in loaded.changes:
            print_note(line)
    return loaded


def _check_name(name: str, overrides: Sequence[str]) -> None:
    if not name.strip():
        raise InputError("-n has no name", fix="write a name after it, or leave -n out")
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.strip() == "model.name" and value != name:
            # An override wins over a flag. Here that would continue, or begin, another run than the one named.
            raise InputError(
                f"the run is named twice: -n {name} and {override}", fix="leave one of them out"
            )


@contextmanager
def placed(loaded: LoadedConfig) -> Iterator[None]:
    """Errors that name only a config key (``teacher.path``) leave here with the file and line that set it."""
    from rnow.config import is_key

    try:
        yield
    except RnowError as error:
        if is_key(error.where or ""):
            error.where = loaded.places.where(error.where or "")
        raise
