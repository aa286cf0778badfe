"""A download as a line: what it says, and how often where nothing is redrawn."""

from __future__ import annotations

import math

import pytest
from tests.display.test_display import Clock, recorder, written

from rnow.display.downloads import Download, DownloadLines
from rnow.display.live_table import LiveTable
from rnow.display.plain_lines import PlainLines


def at(done: float, *, rate: float = math.nan, name: str = "org/model") -> Download:
    return Download(name=name, done=int(done), total=16_400_000_000, rate=rate)


@pytest.mark.parametrize(
    ("download", "line"),
    [
        (at(0), "downloading org/model: 0 B of 16.4 GB"),
        (at(3.2e9, rate=0.0), "downloading org/model: 3.2 GB of 16.4 GB"),
        (
            at(3.2e9, rate=9.5e7),
            "downloading org/model: 3.2 GB of 16.4 GB, 95.0 MB/s, ETA 2:19",
        ),
        (at(16.4e9), "downloaded org/model: 16.4 GB"),
    ],
)
def test_the_line(download: Download, line: str) -> None:
    assert download.line() == line


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    clock, console = Clock(), recorder(100)
    display = PlainLines(console, clock=clock)
    for second in range(25):
        display.download(at(second * 1e8, rate=1e8))
        display.download(at(0, name="other/one"))
        clock.now += 1
    display.download(at(16.4e9))
    lines = [line for line in written(console).splitlines() if "org/model" in line]
    assert [line.split(": ")[1].split(" of")[0] for line in lines] == [
        "0 B",
        "1.0 GB",
        "2.0 GB",
        "16.4 GB",
    ]
    assert written(console).count("other/one") == 3


def test_one_that_is_over_at_once_is_no_line() -> None:
    lines = DownloadLines(Clock())
    assert not lines.due(at(16.4e9))
    assert lines.due(at(0))
    assert lines.due(at(16.4e9))


def test_the_live_table_shows_it_where_stages_are() -> None:
    console = recorder(100)
    display = LiveTable(console, clock=Clock())
    display.download(at(3.2e9, rate=9.5e7, name="org/\x1b[31mmodel"))
    with console.capture() as shown:
        console.print(display)
    assert "downloading org/\\x1b[31mmodel: 3.2 GB of 16.4 GB, 95.0 MB/s, ETA 2:19" in shown.get()
    display.download(at(0, name="b"))
    display.download(at(16.4e9, name="org/\x1b[31mmodel"))
    with console.capture() as shown:
        console.print(display)
    display.close()
    assert "downloading b: 0 B of 16.4 GB" in shown.get()
    assert "org/" not in shown.get()
