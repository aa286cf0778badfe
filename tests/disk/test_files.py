"""Reading JSON files that a crash may have cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.disk.files import read_json_object


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3"])
def test_half_a_file_is_empty(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "summary.json"
    if text is not None:
        path.write_text(text)
    assert read_json_object(path) == {}


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"steps": 3}')
    assert read_json_object(path) == {"steps": 3}
