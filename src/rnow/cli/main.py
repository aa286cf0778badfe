"""The `rnow` command: its subcommands, and how every problem ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rnow import __version__
from rnow.cli import (
    account,
    check,
    compare,
    doctor,
    download,
    evaluate,
    export,
    generate,
    init,
    rehearse,
    report_page,
    rollouts,
    run,
    runs,
    schema,
    serve,
    status,
    study,
    track,
)
from rnow.cli.faults import report
from rnow.cli.hosted import hosted_client_note
from rnow.cli.output import hide, outlets, print_note
from rnow.errors import ALL_ERRORS, EXIT_FAILED, EXIT_INTERRUPTED, InputError
from rnow.text.redact import Redactor
from rnow.text.suggest import closest, did_you_mean

_NEARLY = 0.75
"""How like a command a word must be for the command to be meant."""

app = typer.Typer(
    name="rnow",
    help="Train a student language model by on-policy distillation on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which a user needs them.
app.command("init")(init.init)
app.command("doctor")(doctor.examine)
app.command("check")(check.check)
app.command("schema")(schema.print_schema)
app.command("test")(rehearse.rehearse_rollouts)
app.command("generate")(generate.generate_rows)
app.command("run")(run.run)
app.command("study")(study.run_study)
app.command("status")(status.show_status)
app.command("stop")(status.stop_run)
app.command("logs")(status.show_logs)
app.add_typer(runs.app, name="runs")
app.command("rollouts")(rollouts.show_rollouts)
app.command("report")(report_page.make_report)
app.command("compare")(compare.compare_runs)
app.command("track")(track.track_run)
app.command("eval")(evaluate.evaluate_subjects)
app.command("export")(export.export_run)
app.command("serve")(serve.serve_run)
app.command("download", hidden=True)(download.download)
for _name, _answer in (
    *((name, account.not_needed) for name in account.NOT_NEEDED),
    *((name, account.missing) for name in account.MISSING),
):
    app.command(
        _name,
        hidden=True,
        help="Of the hosted client; not here.",
        context_settings=account.ANY_ARGUMENTS,
    )(_answer)


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
    all_errors: Annotated[
        bool,
        typer.Option(
            ALL_ERRORS, help="List every fault of an error, not ten; before or after the command."
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


def _refuse_unknown(given: Sequence[str]) -> None:
    """Typer would suggest a command for any word."""
    known = [str(each.name) for each in (*app.registered_commands, *app.registered_groups)]
    word = given[0] if given else ""
    if word and not word.startswith("-") and word not in known:
        near = closest(word, known, cutoff=_NEARLY)
        raise InputError(
            f"No such command: {word[:40]}",
            title="Unknown command",
            fix=did_you_mean([f"rnow {name}" for name in near]) or "rnow -h lists the commands",
        )


def run_command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give the exit code.

    An RnowError becomes a short report on standard error and its own code, and so does what the system refuses; anything
    else that goes wrong is a fault of the program, shown with its traceback, and gives 1.

    Args:
        arguments: without the program's name; those of this process when not given.
    """
    with outlets():
        return _run_command_line(list(sys.argv[1:] if arguments is None else arguments))


def _run_command_line(given: list[str]) -> int:
    hide(Redactor())
    everything = ALL_ERRORS in given
    given = [argument for argument in given if argument != ALL_ERRORS]
    try:
        completing = "_RNOW_COMPLETE" in os.environ
        if not (completing or {"-h", "--help", "--version", "-q", "--quiet"}.intersection(given)):
            note = hosted_client_note()
            if note:
                print_note(note)
        _refuse_unknown(given)
        app(args=export.with_default_type(given), prog_name="rnow")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_FAILED * bool(exit_.code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return report(error, everything=everything)
    return 0
