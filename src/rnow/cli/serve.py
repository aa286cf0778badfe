"""`rnow serve`: a trained student behind an OpenAI-compatible server."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from rnow.cli.find import RUNS, complete_run
from rnow.cli.options import Folder, load, placed

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run (its name or folder), RUN@STEP, or an adapter's folder.",
        autocompletion=complete_run,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings of model and sampler that win over config.yml, e.g. sampler.max_num_seqs=64",
        show_default=False,
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", "-s", min=1, help="Which step.", show_default="the last")
]
Host = Annotated[
    str,
    typer.Option("--host", help="Where it listens; 0.0.0.0 is every address.", metavar="ADDRESS"),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port", min=1, max=65535, help="On which port.", show_default="8000, or a free one"
    ),
]


def serve_run(
    run: Run,
    overrides: Settings = None,
    folder: Folder = Path(),
    step: Step = None,
    host: Host = "127.0.0.1",
    port: Port = None,
) -> None:
    """Serve a trained student with vLLM until Ctrl-C, and say how to ask and measure it."""
    from rnow.config import config_for, has_config

    # An adapter may lie anywhere: without a project everything is at its default.
    loaded = load(folder, overrides) if has_config(folder) else None

    from rnow.cli.output import print_lines, print_note, print_warning
    from rnow.setup.serve import serve, usage_lines
    from rnow.setup.subjects import find_trained

    with placed(loaded) if loaded else nullcontext():
        trained = find_trained(
            run,
            folder=folder,
            output_dir=loaded.config.output_dir if loaded else RUNS,
            step=step,
            command="serve",
        )
        serve(
            loaded.config if loaded else config_for(trained.adapter.base, overrides or ()),
            trained,
            folder=folder,
            host=host,
            port=port,
            stage=lambda text: print_note(f"{text} ..."),
            warn=print_warning,
            ready=lambda served: print_lines(usage_lines(served)),
        )
