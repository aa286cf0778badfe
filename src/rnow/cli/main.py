"""The `rnow` command: its subcommands, and how every problem ends."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from rnow import __version__
from rnow.cli import account, check, init, rehearse, run
from rnow.cli.hosted import hosted_client_note
from rnow.cli.output import clean, hide, print_error, print_note
from rnow.errors import EXIT_FAILED, EXIT_INTERRUPTED, RnowError
from rnow.text.redact import Redactor

app = typer.Typer(
    name="rnow",
    help="Train a student language model by on-policy distillation on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("run")(run.run)
app.command("test")(rehearse.rehearse_rollouts)
for _name in account.COMMANDS:
    app.command(_name, hidden=True, help="Not needed: everything runs on this machine.")(
        account.not_needed
    )


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rnow {__version__} (rnow-local)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


def run_command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give the exit code.

    An RnowError becomes a short report on standard error and its own code; anything else that goes wrong is a fault
    of the program, shown with its traceback, and gives 1.

    Args:
        arguments: without the program's name; those of this process when not given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    hide(Redactor())
    try:
        if not {"-h", "--help", "--version"}.intersection(given):
            note = hosted_client_note()
            if note:
                print_note(note)
        app(args=given, prog_name="rnow")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_FAILED * bool(exit_.code)
    except RnowError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        sys.stderr.write(clean(traceback.format_exc()))
        print_note("This is a fault in rnow itself; please report it with the lines above.")
        return EXIT_FAILED
    return 0
