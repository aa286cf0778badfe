"""What each tracker costs a run, in processor time, so that another process on the machine counts little.

``on the loop`` is what a step of the loop itself waits for, ``beside it`` what the tracker's thread takes of the processor for one step;
``a start`` is the first message, with the import of the package and the whole history of ``--history`` steps. The steps have as many numbers
as those of a run. Trackers that are not installed are left out; W&B records offline, and its own process is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from common import write_results

from rnow.disk.folder import RunFolder
from rnow.disk.sinks import JsonlSink
from rnow.setup.trackers import build_trackers
from rnow.text.redact import Redactor

TRACKERS = ("tensorboard", "mlflow", "trackio", "wandb")
NUMBERS = 40
PATIENCE = 600.0


def step_of(number: int) -> dict[str, float]:
    """The metrics of a step."""
    return {"teacher_kl": 1 / number} | {
        f"family/{name}": name / number for name in range(1, NUMBERS)
    }


def measure(name: str, folder: Path, *, steps: int, history: int) -> dict[str, object]:
    """One tracker in a run of ``history`` steps that goes on for ``steps`` more; milliseconds."""
    run = RunFolder(folder / "run")
    run.path.mkdir()
    files = JsonlSink(run.metrics, run.evaluations, warn=print)
    for step in range(1, history + 1):
        files.log(step, step_of(step))
    failed: list[str] = []
    sink = build_trackers(
        [name],
        run,
        home=folder,
        run_id="a" * 16,
        config={"seed": 0},
        labels={},
        warn=failed.append,
        note=lambda text: None,
        redact=Redactor(),
    )
    (worker,) = sink._workers
    began = time.process_time()
    sink.forget_from(history + 1)
    while worker._waiting.unfinished_tasks and not failed:
        time.sleep(0.01)
    started = time.process_time() - began
    on_loop, began = 0.0, time.process_time()
    for step in range(history + 1, history + steps + 1):
        metrics, before = step_of(step), time.thread_time()
        sink.log(step, metrics)
        on_loop += time.thread_time() - before
    sink.close(PATIENCE)
    beside = time.process_time() - began - on_loop
    if failed:
        raise SystemExit(failed[0])
    return {
        "tracker": name,
        "on_loop_ms": 1000 * on_loop / steps,
        "beside_ms": 1000 * beside / steps,
        "start_ms": 1000 * started,
    }


def table(rows: list[dict[str, object]]) -> list[str]:
    """The rows as lines."""
    lines = [f"{'tracker':<14}{'on the loop':>14}{'beside it':>14}{'a start':>14}  (ms; per step)"]
    for row in rows:
        cells = (f"{row[name]:>14.3f}" for name in ("on_loop_ms", "beside_ms", "start_ms"))
        lines.append(f"{row['tracker']:<14}{''.join(cells)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    rows = []
    for name in filter(find_spec, TRACKERS):
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio"}
            rows.append(
                measure(name, Path(folder), steps=arguments.steps, history=arguments.history)
            )
    print("\n".join(table(rows)))
    if arguments.write:
        print(f"written to {write_results('trackers', rows)}")


if __name__ == "__main__":
    main()
