"""The modules of a project that its user's files import."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.project.modules import imported_modules


def project(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "rewards.py"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import json, torch", []),
        ("import one", ["one.py"]),
        ("from one import thing", ["one.py"]),
        ("def later():\n    import one", ["one.py"]),
        ("import pack", ["pack/__init__.py"]),
        ("import pack.inner", ["pack/__init__.py", "pack/inner.py", "pack/other.py"]),
        ("from pack import inner", ["pack/__init__.py", "pack/inner.py", "pack/other.py"]),
        ("import chain", ["chain.py", "one.py"]),
        ("import circle", ["circle.py"]),
        ("import broken", ["broken.py"]),
        ("this is not python", []),
        ("# coding: no-such-thing\nimport one", []),
    ],
)
def test_what_is_found(tmp_path: Path, text: str, expected: list[str]) -> None:
    file = project(
        tmp_path,
        one="x = 1",
        chain="import one",
        circle="import circle, rewards",
        broken="def",
        unused="",
        pack__inner="from . import other\nfrom .. import far",
        pack__other="",
        rewards=text,
    )
    (tmp_path / "pack" / "__init__.py").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in imported_modules(file)]
    assert found == expected


def test_no_file_imports_nothing(tmp_path: Path) -> None:
    assert imported_modules(tmp_path / "rewards.py") == []
