"""The converter's process: answers in order, killed when slow, started again, gone at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rnow.web import to_markdown
from rnow.web.converter import ConversionError, Converter

# Stands in for crawl4ai: the same protocol, with pages that misbehave.
_FAKE = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("script", {to_markdown.__file__!r})
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

def convert(html, base):
    if html == "slow":
        while True: pass
    if html == "die":
        os._exit(3)
    if html == "raise":
        raise ValueError("no")
    if html == "noise":
        print("noise" * 1000, flush=True)
    if html == "memory":
        return str(len(bytearray(8 << 30)))
    return f"{{base}}|{{html.upper()}}|{{os.getpid()}}"

script._load = lambda: convert
script.main()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(_FAKE)
    return path


def _run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_pages_are_converted_by_one_process(fake: Path) -> None:
    async def scenario() -> None:
        converter = Converter(fake)
        await converter.start()
        answers = await asyncio.gather(
            *(converter.convert(f"page{index}é", "b", timeout=30) for index in range(20))
        )
        assert [answer.split("|")[:2] for answer in answers] == [
            ["b", f"PAGE{index}É"] for index in range(20)
        ]
        assert len({answer.rpartition("|")[2] for answer in answers}) == 1
        await converter.close()
        with pytest.raises(ProcessLookupError):
            os.kill(int(answers[0].rpartition("|")[2]), 0)

    _run(scenario)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("slow", "takes too long"),
        ("die", "too much"),
        ("raise", "cannot be turned"),
        ("memory", "cannot be turned"),
    ],
)
def test_a_bad_page_costs_only_itself(fake: Path, page: str, message: str) -> None:
    async def scenario() -> None:
        converter = Converter(fake)
        await converter.start()
        begun = time.monotonic()
        with pytest.raises(ConversionError, match=message):
            await converter.convert(page, "", timeout=0.5)
        assert time.monotonic() - begun < 3
        assert (await converter.convert("next", "", timeout=30)).startswith("|NEXT|")
        await converter.close()

    _run(scenario)


def test_what_a_library_prints_is_no_answer(fake: Path) -> None:
    async def scenario() -> None:
        converter = Converter(fake)
        assert (await converter.convert("noise", "", timeout=30)).startswith("|NOISE|")
        await converter.close()

    _run(scenario)


def test_a_page_given_up_leaves_no_answer_behind(fake: Path) -> None:
    async def scenario() -> None:
        converter = Converter(fake)
        await converter.start()
        slow = asyncio.ensure_future(converter.convert("slow", "", timeout=30))
        await asyncio.sleep(0.2)
        slow.cancel()
        assert (await converter.convert("next", "", timeout=30)).startswith("|NEXT|")
        await converter.close()

    _run(scenario)


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        _FAKE.replace(
            "script._load = lambda: convert",
            "def load(): raise ImportError('no crawl4ai')\nscript._load = load",
        )
    )

    async def scenario() -> None:
        for path, message in (
            (script, "ImportError: no crawl4ai"),
            (tmp_path / "none.py", "ended"),
        ):
            with pytest.raises(ConversionError, match=message):
                await Converter(path).convert("x", "", timeout=5)

    _run(scenario)


def test_a_page_that_comes_too_late_leaves_the_process_alone(fake: Path) -> None:
    async def scenario() -> None:
        converter = Converter(fake)
        first = await converter.convert("page", "", timeout=30)
        with pytest.raises(ConversionError, match="no time"):
            await converter.convert("late", "", timeout=-0.1)
        assert await converter.convert("page", "", timeout=30) == first  # of the same process
        await converter.close()

    _run(scenario)


def test_it_dies_with_its_owner(fake: Path) -> None:
    """Killed with kill -9 in the middle of a page that never ends."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(fake)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


_OWNER = """
import asyncio, sys
from pathlib import Path
from rnow.web.converter import Converter

async def main():
    converter = Converter(Path(sys.argv[1]))
    answer = await converter.convert("page", "", timeout=30)
    print(answer.rpartition("|")[2], flush=True)
    await converter.convert("slow", "", timeout=600)

asyncio.run(main())
"""
