"""What ``rnow eval`` keeps: found again by all that the numbers depend on."""

from __future__ import annotations

import json
from pathlib import Path

from rnow.disk.evals import EvalFile
from rnow.text.redact import Redactor

MEASURED = {"weights": "a", "temperatures": {"1": 0.2}, "stops": (1, 2)}


def test_it_is_read_back_by_what_it_measured(tmp_path: Path) -> None:
    file = EvalFile(tmp_path / "evals", "student", MEASURED, Redactor())
    assert file.read() is None
    file.write({"prompts": 3})
    again = EvalFile(tmp_path / "evals", "student", {**MEASURED}, Redactor())
    assert again.path == file.path
    assert (again.read() or {})["prompts"] == 3
    for other in ({**MEASURED, "weights": "b"}, {**MEASURED, "stops": (1,)}):
        changed = EvalFile(tmp_path / "evals", "student", other, Redactor())
        assert changed.path != file.path
        assert changed.read() is None
    assert EvalFile(tmp_path / "evals", "base", MEASURED, Redactor()).read() is None


def test_answers_of_two_temperatures_have_two_names(tmp_path: Path) -> None:
    file = EvalFile(tmp_path, "student", MEASURED, Redactor())
    names = [
        file.answers_name(t).removeprefix(f"{file.path.stem}-") for t in (1.0, 0, 0.2, 0.2000001)
    ]
    assert names == ["t1", "t0", "t0.2", "t0.2000001"]


def test_a_file_that_is_not_whole_is_none(tmp_path: Path) -> None:
    file = EvalFile(tmp_path, "student", MEASURED, Redactor())
    file.write({"prompts": 3})
    file.path.write_bytes(file.path.read_bytes()[:-9])
    assert file.read() is None
    file.path.write_text(json.dumps({"prompts": 3, "measured": {"weights": "b"}}))
    assert file.read() is None, "a hash of another content"


def test_no_secret_is_kept(tmp_path: Path) -> None:
    redact = Redactor({"KEY": "hush-hush-1"})
    file = EvalFile(tmp_path, "student", {**MEASURED, "tools": "hush-hush-1"}, redact)
    file.write({"subject": "hush-hush-1"})
    assert "hush" not in file.path.read_text()
    assert file.read() is not None
