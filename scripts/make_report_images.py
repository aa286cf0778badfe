"""Pictures of reports for the documentation: each run at the width of a desktop and of a phone, light and dark.

Usage, with the extra agents installed and Chromium:

    python scripts/make_report_images.py docs/images quickstart/runs/quickstart calculator/runs/tool-quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright  # pyright: ignore[reportMissingImports]

from rnow.disk.folder import RunFolder
from rnow.report.build import write_report
from rnow.web.chromium import find_chromium

SIZES = {"desktop": {"width": 1180, "height": 860}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")


def photograph(browser: Browser, run: Path, into: Path) -> None:
    """Four pictures of the rollouts of a run, what is said of the worst token shown."""
    address = write_report(RunFolder(run)).resolve().as_uri()
    for name, size in SIZES.items():
        for scheme in SCHEMES:
            context = browser.new_context(viewport=size, color_scheme=scheme)
            page = context.new_page()
            page.goto(address)
            page.evaluate(
                "document.getElementById('rollouts').scrollIntoView({behavior: 'instant'})"
            )
            page.locator("#list .p5").first.hover()
            page.screenshot(path=into / f"report-{run.name}-{name}-{scheme}.png")
            context.close()


def main(into: Path, runs: list[Path]) -> None:
    """Photograph each run."""
    into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium())
        for run in runs:
            photograph(browser, run, into)
        browser.close()


if __name__ == "__main__":
    target, *folders = map(Path, sys.argv[1:])
    main(target, folders)
