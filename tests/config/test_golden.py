"""The exact report of every fault. ``RNOW_WRITE_GOLDEN=1 pytest tests/config/test_golden.py`` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.config.cases import BASE, CASES

from rnow.config import load_config
from rnow.errors import EXIT_BAD_INPUT, InputError

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", CASES)
def test_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content, overrides = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert [p.name for p in tmp_path.iterdir()] == [file], "nothing may be written"
    golden = HERE / "golden" / f"{name}.txt"
    report = caught.value.render() + "\n"
    if os.environ.get("RNOW_WRITE_GOLDEN"):
        golden.write_text(report, encoding="utf-8")
    assert report == golden.read_text(encoding="utf-8")


def test_every_golden_has_a_case() -> None:
    assert {p.stem for p in (HERE / "golden").glob("*.txt")} == set(CASES)


def test_the_base_of_the_cases_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(BASE)
    assert load_config(path).warnings == []
