"""What messages say to type, and what the documents say, is one thing and works."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from rnow.text.install import install_command

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
)


def test_the_clone_of_an_editable_install(tmp_path: Path) -> None:
    assert install_command("mcp") == f"pip install '{ROOT}[mcp]'"
    clone = tmp_path / "a clone"
    clone.mkdir()
    assert install_command("mcp", clone) == "pip install '.[mcp]' in a clone of rnow"
    (clone / "pyproject.toml").touch()
    assert shlex.split(install_command("mcp", clone))[2] == f"{clone}[mcp]"
    assert (
        install_command("mcp", pip="python -m pip install")
        == f"python -m pip install '{ROOT}[mcp]'"
    )


@pytest.mark.parametrize(
    ("extra", "pins"), [("vllm", "constraints-cuda.txt"), ("agents", "constraints-agents.txt")]
)
def test_a_large_extra_comes_with_versions_that_were_tried(
    extra: str, pins: str, tmp_path: Path
) -> None:
    assert (
        install_command(extra, tmp_path) == f"pip install -c {pins} '.[{extra}]' in a clone of rnow"
    )
    words = shlex.split(install_command(extra))
    assert words == ["pip", "install", "-c", f"{ROOT}/{pins}", f"{ROOT}[{extra}]"]
    assert Path(words[3]).is_file()


def test_nobody_is_sent_to_an_index() -> None:
    """``rnow-local`` stands on none. Whatever names an extra names one that there is."""
    folders = ("src", "docs", "templates", "configs")
    files = [ROOT / "README.md", ROOT / "Makefile"]
    files += [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in files}
    assert not [
        path for path, text in texts.items() if re.search(r"rnow-local\[|pip install rnow", text)
    ]
    named = {
        extra
        for text in texts.values()
        for extras in re.findall(r"install_command\([\"'](\w+)[\"']\)|\.\[(\w[\w,]*)\]'", text)
        for extra in ",".join(extras).split(",")
        if extra
    }
    assert named >= {"vllm", "mcp", "agents", "wandb"}
    assert named <= EXTRAS
