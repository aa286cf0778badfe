"""What ``report.html`` costs: seconds of the processor, memory and bytes, of the quickstart, as a share of its wall time, and of
runs of 200 and 2,000 steps that are made up: neither may grow with the steps.

Usage: ``python benchmarks/report.py [--run RUN]``: a run that is there already instead of training the quickstart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PeakMemory, write_results
from transcripts import make_work

import rnow
from rnow.disk.folder import RunFolder
from rnow.disk.transcripts import TranscriptWriter, step_file
from rnow.project.templates import find_template, plan_init, write_template
from rnow.report.build import build_report
from rnow.text.redact import Redactor


def measure(what: str, folder: RunFolder, repeats: int) -> dict[str, Any]:
    """The least seconds of ``repeats``, after one that imports."""
    page = build_report(folder)
    seconds = []
    with PeakMemory() as memory:
        for _ in range(repeats):
            began = time.process_time()
            build_report(folder)
            seconds.append(time.process_time() - began)
    summary = json.loads(folder.summary.read_text()) if folder.summary.exists() else {}
    wall = summary.get("wall_seconds")
    return {
        "what": what,
        "seconds": min(seconds),
        "memory_mb": memory.extra / 1e6,
        "mb": len(page) / 1e6,
        "share_of_wall": min(seconds) / wall if wall else None,
    }


def train_quickstart(folder: Path) -> RunFolder:
    """As ``make quickstart`` does."""
    write_template(plan_init(find_template("quickstart"), folder), project_name="quickstart")
    return RunFolder(rnow.run(rnow.Config.from_file(folder), folder=folder).run_dir)


def make_up(path: Path, steps: int, *, tokens: int = 200) -> RunFolder:
    """A run of 16 rollouts a step, every step with the same ones."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    work = make_work(prompts=4, group=4, prompt_tokens=64, tokens=tokens, vocabulary=50_000)
    writer = TranscriptWriter(folder.transcripts, decode=work.decode, redact=Redactor())
    writer.write(1, work.data, work.streams)
    writer.settle()
    names = [f"family/{number}" for number in range(40)]
    with folder.metrics.open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "teacher_kl": 1 / step, **dict.fromkeys(names, step / 7)}
            file.write(f"{json.dumps(row)}\n")
            if step > 1:
                step_file(folder.transcripts, step).hardlink_to(step_file(folder.transcripts, 1))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run of the quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        run = RunFolder(arguments.run) if arguments.run else train_quickstart(place / "quickstart")
        rows = [measure("quickstart", run, arguments.repeats)]
        for steps in (200, 2000):
            made = make_up(place / str(steps), steps)
            rows.append(measure(f"{steps} steps", made, arguments.repeats))
    finally:
        shutil.rmtree(place)
    for row in rows:
        share = "" if row["share_of_wall"] is None else f", {row['share_of_wall']:.2%} of the run"
        print(
            f"{row['what']:<12} {row['seconds']:6.2f} s  {row['mb']:5.2f} MB  "
            f"{row['memory_mb']:6.1f} MB of memory{share}"
        )
    print(f"written to {write_results('report', rows)}")


if __name__ == "__main__":
    main()
