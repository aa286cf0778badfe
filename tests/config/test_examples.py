"""Every example in configs/ is a valid config without a warning, and passes the checks of a run with small local models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rnow.config import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yml"))
CASES = {"cpu.yml", "one-24gb-gpu.yml", "one-80gb-gpu.yml", "teacher-on-another-machine.yml"}


def test_there_is_one_for_each_case_of_the_documentation() -> None:
    assert {file.name for file in FILES} >= CASES
    page = (FOLDER.parent / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
    assert all(f"configs/{name}" in page for name in CASES - {"cpu.yml"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_example(file: Path) -> None:
    loaded = load_config(file)
    assert loaded.warnings == []
    assert file.read_text(encoding="utf-8").startswith("# "), "says which hardware it is for"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_example_passes_the_checks_of_a_run(
    file: Path, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    """``rnow check`` on the example as it is, its models replaced by tiny ones and its dataset by a few rows."""
    from rnow.setup import build

    long = {"num_hidden_layers": 1, "max_position_embeddings": 32768}
    student, teacher = tiny_model_dir(seed=0, **long), tiny_model_dir(seed=1, **long)
    config = load_config(file, [f"model.path={student}", f"teacher.path={teacher}"]).config
    rows = 40 * config.data.batch_size
    line = json.dumps({"messages": [{"role": "user", "content": "cat"}]}) + "\n"
    (tmp_path / "train.jsonl").write_text(line * rows)
    plan = build.check(config, tmp_path).to_dict()
    steps = rows * (1 - config.data.val_split) // config.data.batch_size
    assert plan["steps"] == min(steps, config.trainer.max_steps or steps)
