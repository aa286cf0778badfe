"""Runs chat templates in a process of its own, so that one that never ends, or never stops writing, ends this process
and nothing else. Standard library and jinja2 only.

A line in holds one JSON object: ``items``, each the number of a template and its variables; ``sources`` of the numbers
not named before; and ``now``. A line out holds, for each item, ``text`` and ``dated`` (whether the date was read), or
``error`` and whether it was a ``limit``. The environment is that of transformers'
``apply_chat_template``; what would differ between two runs (the date, jinja's random filter) is given or fixed. The variable
``generation_marks``, two texts, is no template's: they are written around what stands between ``{% generation %}`` marks.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import BinaryIO, ClassVar

from jinja2 import Template, nodes, pass_eval_context
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 10
MEMORY_BYTES = 2 * 2**30
MAX_CHARACTERS = 32 * 2**20
GENERATION_MARKS = "generation_marks"


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote; its body is written with the texts ``around`` it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it
    around: ClassVar[Sequence[str]] = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """A block of its own, as in transformers: what is set inside stays inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return f"{self.around[0]}{caller()}{self.around[1]}"


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


class _Templates:
    """Sources by number, each compiled when first used; ``seconds`` of processor time for each rendering."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.clock = _Clock()
        self.sources: dict[int, str] = {}
        self._compiled: dict[int, Template] = {}

    def compiled(self, number: int) -> Template:
        """Raises TemplateError for a source that is no template."""
        if number not in self._compiled:
            made = _environment(self.clock).from_string(self.sources[number])
            self._compiled[number] = made
        return self._compiled[number]


def _render(template: Template, context: dict[str, object]) -> str:
    pieces, length = [], 0
    for piece in template.generate(context):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise OverflowError
        pieces.append(piece)
    return "".join(pieces)


def _answer(number: int, context: dict[str, object], templates: _Templates) -> dict[str, object]:
    random.seed(0)
    templates.clock.read = False
    marks = context.pop(GENERATION_MARKS, None)
    _Generation.around = [str(mark) for mark in marks] if isinstance(marks, list) else ("", "")
    # Processor time, not the clock's: a busy machine is no fault of the template.
    signal.setitimer(signal.ITIMER_PROF, templates.seconds)
    try:
        text = _render(templates.compiled(number), context)
    except OverflowError:
        return {"error": "it wrote too much", "limit": True}
    except MemoryError:
        return {"error": "it took too much memory", "limit": True}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"text": text, "dated": templates.clock.read}


def serve(requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answer until there are no more requests. The kernel ends this process when one takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    templates = _Templates(seconds)
    for line in requests:
        request = json.loads(line)
        templates.clock.now = datetime.fromisoformat(request["now"])
        templates.sources |= {int(number): text for number, text in request["sources"].items()}
        found = [_answer(number, context, templates) for number, context in request["items"]]
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
