"""The page in a real Chromium: what a person does with it, and that it fetches nothing and runs nothing of others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import (
    CONFIG,
    make_run,
    metrics_row,
    rollout_row,
    write_lines,
    write_transcript,
)
from tests.report.test_build import hostile_run
from tests.web.needs import missing

from rnow.comparing.compared import compare
from rnow.comparing.page import compare_page
from rnow.comparing.runs import read_runs
from rnow.disk.folder import RunFolder
from rnow.report.build import write_report
from rnow.web.chromium import find_chromium

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
"""Where `make test-agents` puts it."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium())
        yield browser
        browser.close()


class Visit:
    """A page, of a run where a run is given, opened; and what went on behind it."""

    def __init__(self, chromium: Any, shown: RunFolder | Path, **options: Any) -> None:
        path = write_report(shown) if isinstance(shown, RunFolder) else shown
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        context = chromium.new_context(**({"viewport": DESKTOP} | options))
        self.page = context.new_page()
        self.page.on(
            "console",
            lambda said: said.type in ("error", "warning") and self.errors.append(said.text),
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss())
        )
        self.page.goto(path.as_uri())
        self.address = path.as_uri()

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def is_quiet(self) -> None:
        assert self.errors == []
        assert self.requests == [self.address]
        assert self.dialogs == []


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = make_run(tmp_path / "tiny")
    rows = [
        rollout_row(2, 0, kl=[0.0, 3.0, -0.5], reward=0.0, teacher_top_tokens=[["a"], ["x", "b"], ["c"]], teacher_top_logprobs=[[-0.1], [-0.1, -3.25], [-0.2]]),
        rollout_row(2, 1, status="truncated", end_reason="length"),
        rollout_row(
            2, 2, tokens="abcd", turn=[0, 0, 1, 1],
            answer=[{"role": "assistant"}, {"role": "tool", "name": "add", "content": "12"}, {"role": "assistant"}],
        ),
        rollout_row(2, 3, tokens="zzzzz", kl=[2.0] * 5),
    ]  # fmt: skip
    write_transcript(folder.transcripts, 2, rows)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_draws_itself_and_fetches_nothing(
    chromium: Any, run: RunFolder, scheme: str, size: dict[str, int]
) -> None:
    visit = Visit(chromium, run, viewport=size, color_scheme=scheme)
    assert visit.text("h1") == "tiny"
    for chart in visit.page.locator("#charts figure").all():
        chart.scroll_into_view_if_needed()
        chart.locator("canvas").wait_for()
    assert visit.count("#charts figure") > 5
    assert visit.count("section:not([hidden])") == 9
    assert visit.count("nav a") == 9
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert visit.page.evaluate(wide) <= 0, "nothing sticks out sideways"
    visit.is_quiet()


def test_filters(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run)
    assert visit.text("#found") == "16 rollouts"
    assert visit.count("#list article") == 10
    visit.page.click("#more-rollouts")
    assert visit.count("#list article") == 16
    assert not visit.page.is_visible("#more-rollouts")
    visit.page.select_option("#f-s", "2")
    assert visit.text("#found") == "4 rollouts"
    visit.page.select_option("#f-st", "truncated")
    assert visit.text("#list h3") == "Step 2: dataset_0/1#0"
    visit.page.select_option("#f-st", "")
    visit.page.fill("#f-worst", "2.5")
    assert visit.text("#found") == "1 rollout"
    visit.page.fill("#f-worst", "")
    visit.page.fill("#f-most", "0.5")
    assert visit.text("#list h3") == "Step 2: dataset_0/0#0"
    visit.page.fill("#f-most", "")
    visit.page.fill("#f-text", "bcd")
    assert visit.text("#list h3") == "Step 2: dataset_0/2#0"
    visit.is_quiet()


def test_a_token_is_read_by_pointing_at_it(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run)
    assert not visit.page.is_visible("#token")
    # The worst first.
    token = visit.page.locator("#list .t").nth(1)
    assert "p5" in token.get_attribute("class")
    token.hover()
    said = visit.text("#token")
    assert '"b" token 2 of 3' in said
    assert "KL 3, student -0.25 (77.9 %), teacher -3.25 (3.88 %), entropy 0.75" in said
    assert 'The teacher\'s likeliest: "x" 90.5 %, "b" 3.88 %' in said
    visit.page.mouse.move(0, 0)
    assert not visit.page.is_visible("#token")
    visit.is_quiet()


def test_tokens_are_walked_by_keyboard(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run)
    visit.page.focus("#list .t")
    assert '"a" token 1 of 3' in visit.text("#token")
    for key, expected in (
        ("ArrowRight", '"b" token 2'), ("End", '"c" token 3'), ("ArrowUp", '"b" token 2'), ("Home", '"a" token 1'),
        ("ArrowLeft", '"a" token 1'), ("ArrowDown", '"b" token 2'),
    ):  # fmt: skip
        visit.page.keyboard.press(key)
        assert expected in visit.text("#token"), key
    visit.page.keyboard.press("Escape")
    assert not visit.page.is_visible("#token")
    # One stop for a rollout of one turn: then comes the next prompt.
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.tagName") == "SUMMARY"
    visit.is_quiet()


def test_keys_lead_over_the_turns_of_a_rollout_and_tools_are_grey(chromium: Any, run: RunFolder) -> None:  # fmt: skip
    visit = Visit(chromium, run)
    visit.page.fill("#f-text", "abcd")
    assert visit.text("#list .tool").split() == ["add", "12"]
    visit.page.focus("#list .t >> nth=1")
    visit.page.keyboard.press("ArrowRight")
    assert '"c" token 3 of 4' in visit.text("#token")
    assert visit.count("#list .tool .t") == 0


def test_a_token_of_the_table_leads_to_its_rollouts(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run)
    assert visit.text("#tokens tbody tr:first-child button") == '"z"'
    visit.page.click("#tokens thead button:has-text('times')")
    visit.page.click('#tokens tbody button:has-text("z")')
    assert visit.text("#found") == "1 rollout"
    assert visit.page.input_value("#f-text") == "z"


def test_first_step_against_last(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run)
    assert [visit.text(f"#sides .side >> nth={side} >> h3 >> nth=0") for side in (0, 1)] == ["Step 1", "Step 4"]  # fmt: skip
    visit.page.select_option("#pair", "1")
    assert "say 1" in visit.text("#pair-prompt")
    visit.page.hover("#sides .t >> nth=0")
    assert "KL 0.5" in visit.text("#token")
    assert visit.text("#answers h3") == "before"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["report", "compare"])
@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: make test-agents")
def test_no_accessibility_fault(
    chromium: Any, run: RunFolder, tmp_path: Path, kind: str, scheme: str, size: dict[str, int]
) -> None:
    shown = run if kind == "report" else comparison(tmp_path)
    visit = Visit(chromium, shown, viewport=size, color_scheme=scheme)
    for chart in visit.page.locator("#charts figure").all():
        chart.scroll_into_view_if_needed()
        chart.locator("canvas").wait_for()
    visit.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    if kind == "report":
        visit.page.hover("#list .t >> nth=1")
    visit.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"], "axe looked at something"
    faults = [
        (fault["impact"], fault["id"], [node["html"] for node in fault["nodes"][:3]])
        for fault in found["violations"]
    ]
    assert faults == []


def comparison(folder: Path) -> Path:
    """The page of two runs side by side."""
    runs = [make_run(folder / name, steps=steps) for name, steps in (("one", 4), ("two", 6))]
    path = folder / "both.html"
    path.write_bytes(compare_page(compare(read_runs(runs))))
    return path


def test_runs_side_by_side(chromium: Any, tmp_path: Path) -> None:
    visit = Visit(chromium, comparison(tmp_path))
    assert visit.text("#state") == "one: 4 steps; two: 6 steps"
    charts = visit.page.locator("#charts figure")
    assert visit.text("#charts figure >> nth=0 >> h3").startswith("teacher_kl")
    for chart in charts.all():
        chart.scroll_into_view_if_needed()
        chart.locator("canvas").wait_for()
        labels = {label.strip() for label in chart.locator(".u-legend th").all_inner_texts()}
        assert {"one", "two"} <= labels
    assert "after: pass@1" in visit.text("#evaluations")
    assert visit.count("nav a") == visit.count("section:not([hidden])") == 4
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert visit.page.evaluate(wide) <= 0
    visit.is_quiet()


def test_light_and_dark_are_switched(chromium: Any, run: RunFolder) -> None:
    visit = Visit(chromium, run, color_scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(colour)
    visit.page.click("#theme")
    assert visit.page.evaluate(colour) != light
    visit.page.click("#theme")
    assert visit.page.evaluate(colour) == light
    visit.is_quiet()


def test_hostile_text_is_inert(chromium: Any, tmp_path: Path) -> None:
    visit = Visit(chromium, hostile_run(tmp_path / "p"))
    for summary in visit.page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    visit.page.hover("#list .t >> nth=0")
    assert visit.count("img") == 0
    assert visit.count("script") == 4
    text = visit.text("body")
    assert "</script><script>alert(1)</script>" in text
    assert "\\x1b[31m\\u202e" in text
    assert not set("\x1b\u202e\u2066") & set(text)
    visit.is_quiet()


@pytest.mark.parametrize("kind", ["sft", "failed"])
def test_runs_that_have_little(chromium: Any, tmp_path: Path, kind: str) -> None:
    folder = RunFolder(tmp_path / kind)
    write_lines(folder.metrics, [{"step": step, "loss": 1.0 / step} for step in (1, 2)])
    folder.facts.write_text(json.dumps({"config": CONFIG}))
    if kind == "failed":
        rows = [rollout_row(1, 0, tokens="", kl=None, entropy=None, status="failed", error="OSError: down")]  # fmt: skip
        write_transcript(folder.transcripts, 1, rows)
    visit = Visit(chromium, folder)
    assert visit.count("#charts figure") == 1
    assert ("OSError: down" in visit.text("main")) == (kind == "failed")
    visit.is_quiet()


def test_2000_steps_open_in_under_two_seconds(chromium: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", steps=1)
    write_lines(folder.metrics, [metrics_row(step, 2000) for step in range(1, 2001)])
    tokens = [f"w{number}" for number in range(200)]
    for step in range(1, 2001, 50):
        rows = [rollout_row(step, 50 * step + at, tokens=tokens) for at in range(40)]
        write_transcript(folder.transcripts, step, rows)
    visit = Visit(chromium, folder)
    assert folder.report.stat().st_size > 2e6
    took = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    visit.page.wait_for_function(f"{took} > 0")
    assert visit.page.evaluate(took) < 2000
    visit.is_quiet()
