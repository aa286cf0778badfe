"""Does a constraints file still lead pip to one set of packages? Answers without installing anything.

pip reads metadata only: the index's own, or the end of a wheel by range requests (``fast-deps``). Older pips fetch every
wheel even for a dry run, so a recent one is put into a temporary folder first; where no index answers that, the check is
skipped and says so.

Usage: ``python scripts/check_resolves.py --constraints constraints-cuda.txt '.[vllm,dev]'``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = "pip>=25"
TIMEOUT = 600


def pip(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run pip; ``path`` holds another one than this interpreter's."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )


def main() -> int:
    """0: it resolves, or there is no index to ask; 1: it does not, with pip's reason."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--constraints", required=True)
    parser.add_argument("requirement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        fetched = pip("install", "--quiet", "--target", folder, PIP)
        if fetched.returncode:
            print(f"{arguments.constraints}: skipped, no package index answers")
            return 0
        done = pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--use-feature=fast-deps",
            "-c",
            arguments.constraints,
            arguments.requirement,
            path=target,
        )
    if done.returncode:
        print(f"{arguments.constraints} does not resolve for {arguments.requirement}:")
        print(
            "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        )
        return 1
    print(f"{arguments.constraints}: {arguments.requirement} resolves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
