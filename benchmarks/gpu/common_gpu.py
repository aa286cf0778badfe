"""What the scripts of the first hour on a card share: options, models, and one result file each."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[1] / "src"))

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "vllm",
    "vllm-bnb-plugin",
    "pydantic",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict[str, Any]:
    """The first card as torch sees it; ``cpu`` without one."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    free, total = torch.cuda.mem_get_info()
    return {
        "device": torch.cuda.get_device_name(0),
        "cards": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "free_gb": free / 1e9,
        "total_gb": total / 1e9,
    }


def main(name: str, description: str, work: Callable[[bool], list[dict[str, Any]]]) -> None:
    """Run ``work(dry)`` and write ``<name>.json``: device, versions, seconds and rows. Without a card it is a dry run, tiny and on
    the CPU, which shows that the script works. A failure is written too, and is the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "gpu")
    arguments = parser.parse_args()
    import torch

    dry = arguments.dry_run or not torch.cuda.is_available()
    started, error = time.perf_counter(), None
    rows: list[dict[str, Any]] = []
    try:
        rows = work(dry)
    except Exception as failure:  # what failed on a card is what we are here for
        error = f"{type(failure).__name__}: {failure}"
    result = {
        "name": name,
        "dry_run": dry,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"device": "cpu"} if dry else card(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
        "error": error,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}: {error or 'done'} in {result['seconds']} s, {path}")
    sys.exit(1 if error or any("error" in row for row in rows) else 0)


def pytest_rows(*targets: str, dry: bool) -> list[dict[str, Any]]:
    """Run tests marked gpu, and give each outcome; dry, only that they can be collected."""
    import subprocess
    import xml.etree.ElementTree as Tree

    root, report = HERE.parents[1], Path("/tmp") / f"rnow-gpu-{time.time_ns()}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        *targets,
    ]
    command += ["--collect-only"] if dry else [f"--junitxml={report}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if dry or not report.exists():
        tail = (done.stdout + done.stderr).splitlines()[-3:]
        return [
            {"collected": done.returncode == 0, "tail": tail}
            | ({} if done.returncode == 0 else {"error": " | ".join(tail)})
        ]
    rows = []
    for case in Tree.parse(report).getroot().iter("testcase"):
        row: dict[str, Any] = {"test": case.get("name"), "seconds": float(case.get("time", 0))}
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                row["skipped" if kind == "skipped" else "error"] = (found.get("message") or "")[
                    :600
                ]
        rows.append(row)
    report.unlink()
    return rows
