"""`kill -9` at random moments, and in the middle of saves: does what comes after equal what would have come without it?

The quickstart (or another template), cut to some twenty seconds with a checkpoint after every step, is run once to its end. Then it is run again and
killed, and continued, and killed, ... A run that comes to its end is compared with the first: metrics without times, evaluations,
transcripts and adapter, byte by byte; then the next begins, until there were enough kills. Every attempt is the real command in
a process of its own.

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --template tool-quickstart --set teacher.residency=streamed

A save is met by watching for the folder that it writes into; it counts as met when that folder is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnow.disk.transcript_rows import read_step

TIMED = ("time/", "throughput/", "memory/")
SETTINGS = (
    "data.batch_size=4", "data.group_size=2", "data.val_split=0.002", "evaluation.num_samples=1",
    "evaluation.max_prompts=4", "trainer.save_step=1", "trainer.keep_checkpoints=2",
)  # fmt: skip
IN_A_SAVE_EVERY = 2  # of the kills, one in so many waits for a save
SAVES_AHEAD = 5
"""An attempt is killed in one of its first so many saves, so that the next has something to go on from."""
LONGEST = 600.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: seconds after the start, the newest checkpoint then, and whether it left half a save behind."""

    seconds: float
    step: int
    in_save: bool


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end after some kills. ``differs``: the files that are not those of the uninterrupted run."""

    kills: tuple[Kill, ...]
    attempts: int
    differs: tuple[str, ...]


def run_dir(project: Path) -> Path:
    return project / "runs" / "quickstart"


def start(project: Path, steps: int, more: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The command with ``more`` settings, in a process of its own; what it prints is kept in log.txt."""
    command = [sys.executable, "-m", "rnow", "run", *SETTINGS, f"trainer.max_steps={steps}", *more]
    with (project / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=project,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )


def half_saves(project: Path) -> list[Path]:
    """What a save in progress, or one that was killed, writes into."""
    return list((run_dir(project) / "checkpoints").glob(".tmp-[0-9]*"))


def newest(project: Path) -> int:
    """The step of the newest checkpoint; 0 for none."""
    found = (run_dir(project) / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def kill_once(
    project: Path,
    steps: int,
    more: Sequence[str] = (),
    *,
    moment: float,
    save: int | None,
    wait: float,
) -> Kill | None:
    """Start (or continue) the run and kill it ``moment`` seconds later, or ``wait`` seconds into its n-th ``save``. None when
    it came to its end before."""
    earlier = set(half_saves(project))  # of the attempt that was killed before
    process = start(project, steps, more)
    began = time.monotonic()
    seen: set[Path] = set()
    while process.poll() is None:
        now = time.monotonic() - began
        if now > LONGEST:
            process.kill()
            raise RuntimeError(f"an attempt took more than {LONGEST:.0f} s; see {project}/log.txt")
        if save is not None:
            seen.update(set(half_saves(project)) - earlier)
        if now >= moment if save is None else len(seen) >= save:
            time.sleep(0 if save is None else wait)
            process.kill()
            break
        time.sleep(0.001)
    if process.wait() == 0:
        return None
    if process.returncode > 0:
        raise RuntimeError(f"exit code {process.returncode}; see {project}/log.txt")
    return Kill(
        seconds=time.monotonic() - began,
        step=newest(project),
        in_save=bool(set(half_saves(project)) - earlier),
    )


def numbers(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what depends on the clock and the machine's memory."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def differences(mine: Path, whole: Path) -> Iterator[str]:
    """Names of the files of a run folder that are not those of another."""
    if numbers(mine / "metrics.jsonl") != numbers(whole / "metrics.jsonl"):
        yield "metrics.jsonl"
    names = {"evaluations.jsonl", "adapter/adapter_model.safetensors"}
    # A run that learns from rows has none.
    names |= {
        f"transcripts/{path.name}"
        for run in (mine, whole)
        for path in (run / "transcripts").glob("*")
    }
    for name in sorted(names):
        files = mine / name, whole / name
        contents = [file.read_bytes() if file.is_file() else None for file in files]
        if contents[0] != contents[1] and (None in contents or _rows(files[0]) != _rows(files[1])):
            yield name


def _rows(file: Path) -> str:
    """What a table holds, but for where its project is, which the traceback of a tool names; of any other file its name."""
    if file.suffix != ".parquet":
        return str(file)
    return json.dumps(read_step(file)).replace(str(file.parents[3]), "")


def make_project(folder: Path, template: str) -> Path:
    """A template as `rnow init` writes it, whose run has the name that ``run_dir`` knows."""
    command = [sys.executable, "-m", "rnow", "init", "--template", template, "--name", "quickstart"]
    subprocess.run([*command, "--dir", str(folder), "--yes"], check=True, capture_output=True)
    return folder


def measure(
    folder: Path,
    *,
    kills: int,
    saves: int,
    steps: int,
    seed: int,
    template: str = "quickstart",
    more: Sequence[str] = (),
) -> list[Finished]:
    """Kill until there were ``kills``, ``saves`` of them in a save; ``folder`` gets the projects. ``more``: settings."""
    dice = random.Random(seed)
    original = make_project(folder / "original", template)
    # One place for all, one after the other: what a tool raised is kept with the path of its file.
    place = folder / "project"
    shutil.copytree(original, place)
    began = time.monotonic()
    if start(place, steps, more).wait() != 0:
        raise RuntimeError(f"the uninterrupted run failed; see {place}/log.txt")
    seconds = time.monotonic() - began
    whole = place.rename(folder / "whole")
    print(f"uninterrupted: {steps} steps in {seconds:.1f} s", flush=True)
    finished: list[Finished] = []
    done = met = 0
    while done < kills or met < saves:
        project = shutil.copytree(original, place)
        mine: list[Kill] = []
        attempts, ended = 1, False
        while not ended:
            enough = done >= kills and met >= saves
            in_save = met < saves and (done >= kills or dice.randrange(IN_A_SAVE_EVERY) == 0)
            kill = kill_once(
                project,
                steps,
                more,
                moment=LONGEST if enough else dice.uniform(0.1, 0.9) * seconds,
                save=dice.randint(1, SAVES_AHEAD) if in_save else None,
                wait=dice.uniform(0, 0.01),
            )
            ended = kill is None
            if kill is not None:
                attempts, done, met = attempts + 1, done + 1, met + kill.in_save
                mine.append(kill)
                where = "in a save" if kill.in_save else "elsewhere"
                print(
                    f"kill {done}: {kill.seconds:.2f} s, checkpoint {kill.step}, {where}",
                    flush=True,
                )
        differs = tuple(differences(run_dir(project), run_dir(whole)))
        project.rename(folder / f"killed-{len(finished)}")
        finished.append(Finished(kills=tuple(mine), attempts=attempts, differs=differs))
    return finished


def table(finished: list[Finished]) -> list[str]:
    """A line per run that came to its end, and the sum."""
    lines = [
        f"{'run':>5}{'attempts':>10}{'kills':>7}{'in a save':>11}  against the uninterrupted run"
    ]
    for number, row in enumerate(finished, 1):
        met = sum(kill.in_save for kill in row.kills)
        verdict = "the same" if not row.differs else f"differs: {', '.join(row.differs[:4])}"
        lines.append(f"{number:>5}{row.attempts:>10}{len(row.kills):>7}{met:>11}  {verdict}")
    total = [kill for row in finished for kill in row.kills]
    met, wrong = sum(kill.in_save for kill in total), sum(bool(row.differs) for row in finished)
    attempts = sum(row.attempts for row in finished)
    lines.append(
        f"{'all':>5}{attempts:>10}{len(total):>7}{met:>11}  {wrong} of {len(finished)} differ"
    )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--template", default="quickstart", help="one with a tiny model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--saves", type=int, default=20, help="at least so many of them in a save")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        dest="more",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting more",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finished = measure(Path(folder), **vars(arguments))
    print("\n".join(table(finished)))
    return int(any(row.differs for row in finished))


if __name__ == "__main__":
    sys.exit(main())
