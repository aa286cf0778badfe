"""The table of a study, on a terminal and in Markdown."""

from __future__ import annotations

from rich.console import Console

from rnow.cli.study_view import study_markdown, study_table
from rnow.config import Config
from rnow.setup.study import Result, Study, StudyRun

CONFIG = Config(dataset_type="distill", model={"path": "s", "name": "a|<b>"}, teacher={"path": "t"})


def study(*measured: tuple[str, int, float | None]) -> Study:
    return Study(
        name="lr",
        results=[
            Result(
                run=StudyRun(setting=(("trainer.learning_rate", rate),), seed=seed, config=CONFIG),
                measures={} if value is None else {"after: pass@1": value},
                error="no\nroom" if value is None else None,
            )
            for rate, seed, value in measured
        ],
    )


FOUND = study(
    ("1", 0, 0.5), ("1", 1, 0.6), ("2", 0, 0.8), ("2", 1, 0.9), ("3", 0, 0.7), ("3", 1, None)
)


def test_one_row_for_each_setting() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(study_table(FOUND))
    head, _, one, two, minus_two, three, minus_three = capture.get().rstrip().splitlines()
    assert head.split() == ["trainer.learning_rate", "seeds", "after:", "pass@1"]
    assert one.split() == ["1", "2/2", "0.550", "[-0.085,", "1.185]"]
    assert two.split()[:3] == ["2", "2/2", "0.850"]
    assert minus_two.split() == ["-", "first", "+0.300", "[+0.300,", "+0.300]"]
    assert three.split() == ["3", "1/2", "0.700"]
    assert minus_three.split() == ["-", "first", "+0.200"]


def test_markdown_is_whole_and_inert() -> None:
    text = study_markdown(FOUND)
    assert "| 1 | 2/2 | 0.550 [-0.085, 1.185] |" in text
    assert "| a\\|&lt;b> | no room |" in text
    assert text.count("| a\\|&lt;b> |") == 6
