"""From the command to the first rollout: `rnow run` of the quickstart, evaluations off, stage by stage.

    python benchmarks/startup.py               # five rounds, in each the imports alone and then the run; writes results/
    python benchmarks/startup.py --rounds 1 --try

The clock runs from before the process is started. ``imports`` is a process that does nothing but ``import torch, transformers,
peft``, which every run needs. ``first line`` is the first byte that `rnow run` writes. All else is when the run says what it
does now. One thread, each process alone; medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_results

TEMPLATE = Path(__file__).parents[1] / "templates" / "quickstart"
IMPORTS = "import torch, transformers, peft"
OFF = ("data.val_split=0",)
LAST = "rollout"


def stamp_and_run(began: float, folder: Path) -> None:
    """In the run's process: say when each stage begins, and leave at the first rollout."""
    from rnow.display.plain_lines import PlainLines

    def stamped(self: PlainLines, name: str) -> None:
        sys.__stderr__.write(f"STAGE {time.time() - began:.3f} {name}\n")
        sys.__stderr__.flush()
        if name == LAST:
            os._exit(0)

    PlainLines.stage = stamped  # type: ignore[method-assign]
    from rnow.cli.main import run_command_line

    sys.exit(run_command_line(["run", "--dir", str(folder), *OFF]))


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    began = time.time()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return time.time() - began


def first_byte(folder: Path, environment: dict[str, str]) -> float:
    """Until `rnow run` writes something, as a user starts it."""
    began = time.time()
    command = [sys.executable, "-m", "rnow", "run", "--dir", str(folder), *OFF]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        found = time.time() - began
        process.kill()
    return found


def stages(folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Stage -> seconds since the command at which it began."""
    command = [sys.executable, __file__, "--inside", str(time.time()), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found: dict[str, float] = {}
    for line in done.stderr.splitlines():
        if line.startswith("STAGE "):
            _, seconds, name = line.split(" ", 2)
            found.setdefault(name, float(seconds))
    if LAST not in found:
        raise SystemExit(f"the run came to no rollout:\n{done.stdout}{done.stderr}")
    return found


def one_round(environment: dict[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        shutil.copytree(TEMPLATE, folder)
        found = {"imports": seconds_of([sys.executable, "-c", IMPORTS], environment)}
        found["first line"] = first_byte(folder, environment)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        return found | stages(folder, environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--try", dest="trial", action="store_true", help="write no result")
    parser.add_argument("--inside", nargs=2, metavar=("BEGAN", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        began, folder = options.inside
        stamp_and_run(float(began), Path(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    rounds = [one_round(environment) for _ in range(options.rounds + 1)][
        1:
    ]  # the first fills caches
    rows: list[dict[str, Any]] = []
    before = 0.0
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        seconds = statistics.median(values)
        rows.append({"what": name, "seconds": round(seconds, 2), "all": values})
        passed = "" if name in ("imports", "first line") else f"  +{seconds - before:.2f}"
        before = before if not passed else seconds
        print(f"{seconds:7.2f} s{passed:8}  {name}")
    beyond = statistics.median(found[LAST] - found["imports"] for found in rounds)
    rows.append({"what": "rollout beyond imports", "seconds": round(beyond, 2)})
    print(f"{beyond:7.2f} s          {LAST} beyond the imports")
    if not options.trial:
        print(f"written to {write_results('startup', rows)}")


if __name__ == "__main__":
    main()
