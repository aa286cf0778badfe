"""Runs chat templates in a process of its own, so that one that never ends, or never stops writing, ends this process
and nothing else. Standard library and jinja2 only.

One JSON object a line in (``id`` and, the first time, ``source`` of the template; ``context``; ``now``), one out
(``text`` and ``dated``: whether the date was read; or ``error``). The environment is that of transformers'
``apply_chat_template``; what would differ between two runs (the date, jinja's random filter) is given or fixed.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import BinaryIO

from jinja2 import Template, nodes, pass_eval_context
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 10
MEMORY_BYTES = 2 * 2**30
MAX_CHARACTERS = 32 * 2**20
TOO_LONG = "too long"


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote; here its body alone counts."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A block of its own, as in transformers: what is set inside stays inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class _Clock:
    """The date that templates read, and whether one did."""

    def __init__(self) -> None:
        self.now = datetime.fromtimestamp(0, UTC)
        self.read = False

    def strftime_now(self, format: str) -> str:
        """What transformers offers under this name."""
        self.read = True
        return self.now.strftime(format)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment(clock: _Clock) -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = clock.strftime_now
    return made


def _render(template: Template, context: dict[str, object]) -> str:
    pieces, length = [], 0
    for piece in template.generate(context):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise OverflowError
        pieces.append(piece)
    return "".join(pieces)


def _answer(line: bytes, templates: dict[int, Template], clock: _Clock) -> dict[str, object]:
    request = json.loads(line)
    number = request["id"]
    clock.now, clock.read = datetime.fromisoformat(request["now"]), False
    random.seed(0)
    try:
        if number not in templates:
            templates[number] = _environment(clock).from_string(request["source"])
        text = _render(templates[number], request["context"])
    except OverflowError:
        return {"error": TOO_LONG, "limit": True}
    except MemoryError:
        return {"error": "too much memory", "limit": True}
    except Exception as error:
        return {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
    return {"text": text, "dated": clock.read}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more requests. The kernel ends this process when one takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    templates: dict[int, Template] = {}
    clock = _Clock()
    for line in requests:
        # Processor time, not the clock's: a busy machine is no fault of the template.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(line, templates, clock)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
