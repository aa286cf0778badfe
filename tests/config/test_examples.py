"""Every example in configs/ is a valid config without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.config import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yml"))


def test_there_are_examples_for_a_small_and_a_large_gpu() -> None:
    assert {"one-24gb-gpu.yml", "one-80gb-gpu.yml"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_example(file: Path) -> None:
    loaded = load_config(file)
    assert loaded.warnings == []
    assert file.read_text(encoding="utf-8").startswith("# "), "says which hardware it is for"
