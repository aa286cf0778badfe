"""HTML to markdown with crawl4ai, in a process of its own: some pages make the conversion quadratic, and only a process
can be stopped in the middle of that.

Run by path (``python -P to_markdown.py``), not imported. Each request and each answer is four bytes of length, big-endian,
and a JSON object: ``{"html", "base"}`` in, ``{"text"}`` or ``{"error"}`` out. The first answer comes unasked and says
whether crawl4ai could be imported. Ends when its input does, or when its owner dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
_MEMORY = 4 << 30  # address space, in bytes


def _load() -> Callable[[str, str], str]:
    # crawl4ai makes folders in the home folder when it is imported, and prints an advertisement.
    home = tempfile.mkdtemp(prefix="rnow-crawl4ai-")
    os.environ["CRAWL4_AI_BASE_DIRECTORY"] = home
    os.environ["CRAWL4AI_NO_CLOUD_NOTICE"] = "1"
    try:
        from crawl4ai.markdown_generation_strategy import (  # pyright: ignore[reportMissingImports]
            DefaultMarkdownGenerator,
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    generator = DefaultMarkdownGenerator(options={"body_width": 0, "ignore_images": True})

    def convert(html: str, base: str) -> str:
        # Links stay where they are, with absolute addresses: a model that wants to follow one needs it there.
        return generator.generate_markdown(html, base_url=base, citations=False).raw_markdown

    return convert


def _read(stream: BinaryIO) -> dict[str, str] | None:
    size = stream.read(4)
    if len(size) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(size, "big")))


def _write(stream: BinaryIO, answer: dict[str, str]) -> None:
    data = json.dumps(answer).encode("ascii")
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def main() -> None:
    """Serve until the input ends."""
    owner = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > _MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    requests = sys.stdin.buffer
    try:
        convert = _load()
    except Exception as error:
        _write(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _write(answers, {"text": ""})
    while (request := _read(requests)) is not None:
        try:
            answer = {"text": convert(request["html"], request["base"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write(answers, answer)


if __name__ == "__main__":
    main()
