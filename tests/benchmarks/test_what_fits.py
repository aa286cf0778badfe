"""The plans of the shipped configs on several cards, from the shapes of the models alone."""

from __future__ import annotations

from tests.benchmarks.scripts import BENCHMARKS, load_benchmark


def test_the_table_in_the_docs_is_what_the_plan_says() -> None:
    script = load_benchmark("what_fits")
    name = "teacher-on-another-machine"
    lines = script.table(script.plans((name,))).splitlines()
    page = (BENCHMARKS.parent / "docs" / "how-to" / "what-fits.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith(f"| {name}")]
    assert lines[2:] == shown
    assert "fits, time_shared" in shown[0], "24 GB"
    assert "fits, resident" in shown[-1], "141 GB"
