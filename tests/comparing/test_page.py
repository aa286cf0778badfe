"""The page of a comparison: all runs in every chart, nothing from outside, hostile text inert."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from tests.comparing.folders import evaluate, make_run

from rnow.comparing.compared import compare
from rnow.comparing.page import render
from rnow.comparing.runs import read_runs

HOSTILE = '<script>alert("x")</script>\u202e\x1b[31m'


class Reader(HTMLParser):
    """Tags with their attributes, and whether each that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def page_of(tmp_path: Path, *, steps: int = 20, hostile: str = "") -> str:
    folders = []
    for place, name in enumerate(("one", "two", "three")):
        run = make_run(
            tmp_path / name,
            steps=steps - place,
            metrics={
                "reward/mean": lambda step, place=place: step * place,
                f"teacher_kl/{hostile}d": float,
            },
            config={"description": f"{hostile}{name}"},
        )
        evaluate(run, f"after{hostile}", steps, (place, 4, 2, 0))
        folders.append(run)
    return render(compare(read_runs(folders)))


def test_every_chart_has_every_run(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.count("<figure>") == page.count("<figcaption>") == 3
    assert page.count("<polyline") == 9
    drawn = [len(points.split()) for points in re.findall(r'points="([^"]+)"', page)]
    assert drawn[:3] == [20, 19, 18], "a shorter run has a shorter curve"
    tags = Reader(page).tags
    (policy,) = [attrs for tag, attrs in tags if "http-equiv" in attrs]
    assert "default-src 'none'" in str(policy["content"])
    loaded = {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not loaded
    assert not re.search(r"https?:|src=|url\(", page)


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    assert len(page_of(tmp_path, steps=2000)) < 200_000


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile=HOSTILE.replace("/", "|"))
    tags = {tag for tag, _ in Reader(page).tags}
    assert "script" not in tags
    assert "&lt;script&gt;" in page
    assert not {"\u202e", "\x1b"} & set(page)


def test_one_step_and_a_flat_curve(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, steps=1) for name in ("one", "two")]
    page = render(compare(read_runs(folders)))
    assert "nan" not in page
    assert "The configs are the same." in page
