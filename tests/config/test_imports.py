"""Reading a config, and refusing one, loads no machine-learning library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from rnow.config import load_config
from rnow.errors import ConfigError
try:
    load_config(sys.argv[1])
    outcome = "valid"
except ConfigError as error:
    outcome = "refused"
heavy = {"torch", "transformers", "peft", "datasets", "wandb", "numpy", "vllm", "rich", "typer"}
sys.stdout.write(outcome + " " + ",".join(sorted(heavy & set(sys.modules))))
"""


@pytest.mark.parametrize(("more", "outcome"), [("", "valid"), ("lr: 1\n", "refused")])
def test_no_heavy_imports(tmp_path: Path, more: str, outcome: str) -> None:
    path = tmp_path / "config.yml"
    path.write_text("dataset_type: distill\nmodel: {path: s}\nteacher: {path: t}\n" + more)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{outcome} "
