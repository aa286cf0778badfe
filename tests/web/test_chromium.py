"""Finding the browser, and what it is started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnow.errors import InputError
from rnow.web import browser, chromium
from rnow.web.chromium import chromium_arguments, find_chromium, require_packages


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any browser."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "playwright"))
    monkeypatch.setattr(chromium, "_USUAL_FOLDERS", ())
    return tmp_path


def test_no_browser_says_how_to_get_one(bare: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_chromium()
    assert "crawl4ai-setup" in caught.value.render()
    assert "apt-get install chromium" in caught.value.render()


def test_the_chosen_one_must_exist(bare: Path) -> None:
    with pytest.raises(InputError, match="no browser"):
        find_chromium("/no/such/browser")
    chosen = _program(bare / "mine")
    assert find_chromium(str(chosen)) == str(chosen)


def test_the_systems_own_is_found(bare: Path) -> None:
    chrome = _program(bare / "bin" / "google-chrome")
    assert find_chromium() == str(chrome)
    debians = _program(bare / "bin" / "chromium")
    assert find_chromium() == str(debians)


def test_playwrights_newest_comes_first(bare: Path) -> None:
    _program(bare / "bin" / "chromium")
    for revision, folder in (
        ("999", "chrome-linux"),
        ("1255", "chrome-linux64"),
        ("1100", "chrome-linux"),
    ):
        newest = bare / "playwright" / f"chromium-{revision}" / folder / "chrome"
        _program(newest)
    assert find_chromium() == str(bare / "playwright/chromium-1255/chrome-linux64/chrome")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chromium.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="crawl4ai") as caught:
        require_packages()
    assert "pip install" in caught.value.render()


def test_the_proxy_is_the_only_way_out() -> None:
    arguments = chromium_arguments("http://127.0.0.1:4711")
    assert "--proxy-server=http://127.0.0.1:4711" in arguments
    assert "--proxy-bypass-list=<-loopback>" in arguments
    assert "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1" in arguments
    assert "--disable-quic" in arguments
    assert not any("remote-debugging" in argument for argument in arguments)


def test_folders_of_the_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser.tempfile, "tempdir", str(tmp_path))
    for name in ("rnow-browser-used", "rnow-browser-old", "rnow-browser-new", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if not name.endswith("new"):
            os.utime(tmp_path / name, (1, 1))
    (tmp_path / "rnow-browser-link").symlink_to(tmp_path / "other")
    os.utime(tmp_path / "rnow-browser-link", (1, 1), follow_symlinks=False)
    descriptor = browser._lock(tmp_path / "rnow-browser-used")
    browser._remove_orphans()
    os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        "rnow-browser-link",
        "rnow-browser-new",
        "rnow-browser-used",
    ]
    assert (tmp_path / "other" / "file").exists()


def test_importing_the_room_loads_no_browser_library() -> None:
    code = (
        "import sys, rnow.web; "
        "assert not {'crawl4ai', 'playwright', 'torch', 'pydantic', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
