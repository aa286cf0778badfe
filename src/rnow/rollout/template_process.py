"""The process that chat templates run in, seen from here: see ``template_worker``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rnow.errors import InputError
from rnow.rollout import template_worker

Asked = tuple[str, Mapping[str, object]]
"""The source of a template, and its variables."""

_AT_ONCE = 32


class TemplateFault(Exception):
    """A chat template refused a conversation, or failed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a template wrote, and whether it read the date."""

    text: str
    dated: bool


class TemplateProcess:
    """Renders conversations; started when first asked, and again after a template ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}

    def render(
        self, asked: Sequence[Asked], *, now: datetime, name: str
    ) -> list[Written | TemplateFault]:
        """What each template writes, or why it does not.

        Args:
            asked: sources of templates with their variables, as JSON can hold them.
            now: what templates read as the date.
            name: whose templates they are, for errors.

        Raises:
            InputError: one took too long, too much memory, or wrote too much.
        """
        found: list[Written | TemplateFault] = []
        for start in range(0, len(asked), _AT_ONCE):
            with self._lock:
                answers = self._ask(asked[start : start + _AT_ONCE], now)
            for answer in answers:
                if answer.get("limit"):
                    raise _limit_error(str(answer["error"]), name)
                if "text" in answer:
                    text, dated = str(answer["text"]), bool(answer["dated"])
                    found.append(Written(text=text, dated=dated))
                else:
                    found.append(TemplateFault(str(answer["error"])))
        return found

    def _ask(self, asked: Sequence[Asked], now: datetime) -> list[dict[str, object]]:
        process = self._process or self._start()
        new = {source for source, _ in asked if source not in self._known}
        items = [(self._known.setdefault(s, len(self._known)), context) for s, context in asked]
        request = {
            "items": items,
            "sources": {self._known[source]: source for source in new},
            "now": now.isoformat(),
        }
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # an answer that nobody read would be taken for that of the next
            self._end()
            raise
        if answer.endswith(b"\n"):
            return json.loads(answer)
        status = self._end()
        slow = status in (-signal.SIGPROF, -signal.SIGXCPU)
        reason = "it took too long" if slow else f"its process ended with status {status}"
        return [{"error": reason, "limit": True}]

    def _start(self) -> subprocess.Popen[bytes]:
        self._known = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__, str(template_worker.CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Alone in its session: Ctrl-C is for this process, which then ends it.
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return process.wait()


def _limit_error(what: str, name: str) -> InputError:
    bounds = (
        f"at most {template_worker.CPU_SECONDS} s, "
        f"{template_worker.MEMORY_BYTES // 2**30} GB of memory and "
        f"{template_worker.MAX_CHARACTERS // 2**20} million letters for one conversation"
    )
    return InputError(
        f"the chat template of {name} did not come to an end",
        title="Chat template out of bounds",
        where=name,
        why=f"{what}; a template may take {bounds}",
        fix="use a model with another chat_template.jinja, or mend a local copy of it; is one row very long, or memory short "
        "here (`ulimit -v`)?",
    )


PROCESS = TemplateProcess()
"""One for all templates of this process."""
