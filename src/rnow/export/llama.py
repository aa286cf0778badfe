"""What llama.cpp makes of a GGUF file, where llama-cpp-python is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rnow.errors import RnowError
from rnow.export import llama_worker

PACKAGE = "llama-cpp-python"
_SECONDS = 1800
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaAnswer:
    """Of llama.cpp: log-probabilities of the ids but the first, the ids of a text, and those that it goes on with, greedily."""

    logprobs: Sequence[float]
    ids: Sequence[int]
    greedy: Sequence[int]


def has_llama() -> bool:
    """Whether GGUF files can be run here."""
    return importlib.util.find_spec("llama_cpp") is not None


def ask_llama(
    file: Path, ids: Sequence[int], *, vocabulary: int, text: str = "", greedy: int = 0
) -> LlamaAnswer:
    """Run a GGUF file on the CPU.

    Args:
        ids: to score, two at least.
        vocabulary: ids that count; a model may have more rows.
        text: is read as tokens, and gone on with for ``greedy`` of them.

    Raises:
        RnowError: llama.cpp cannot run it.
    """
    asked = {"model": str(file), "ids": list(ids), "vocabulary": vocabulary, "text": text}
    command = [sys.executable, "-P", llama_worker.__file__]
    given = json.dumps(asked | {"greedy": greedy})
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _cannot(file, [f"it was not done after {_SECONDS} s"]) from error
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise _cannot(file, done.stderr.splitlines()[-_SHOWN:]) from error
    return LlamaAnswer(logprobs=answer["logprobs"], ids=answer["ids"], greedy=answer["greedy"])


def _cannot(file: Path, details: Sequence[str]) -> RnowError:
    return RnowError(
        f"llama.cpp cannot run {file.name}",
        title="Not what was trained",
        where=str(file.parent),
        details=details,
        fix=f"update {PACKAGE}, or export another form: --merge",
    )
