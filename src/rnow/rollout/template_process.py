"""The process that chat templates run in, seen from here: see ``template_worker``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from rnow.errors import InputError
from rnow.rollout import template_worker


class TemplateFault(Exception):
    """A chat template refused a conversation, or failed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a template wrote, and whether it read the date."""

    text: str
    dated: bool


class TemplateProcess:
    """Renders one conversation at a time; started when first asked, and again after a template ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}

    def render(
        self, source: str, context: Mapping[str, object], *, now: datetime, name: str
    ) -> Written:
        """The text that the template ``source`` writes.

        Args:
            context: its variables, as JSON can hold them.
            now: what it reads as the date.
            name: whose template it is, for errors.

        Raises:
            TemplateFault: the template raised, or is no valid template.
            InputError: it took too long, too much memory, or wrote too much.
        """
        with self._lock:
            answer = self._ask(source, context, now)
        if "text" in answer:
            return Written(text=str(answer["text"]), dated=bool(answer["dated"]))
        if answer.get("limit"):
            raise _limit_error(str(answer["error"]), name)
        raise TemplateFault(str(answer["error"]))

    def _ask(self, source: str, context: Mapping[str, object], now: datetime) -> dict[str, object]:
        process = self._process or self._start()
        request: dict[str, object] = {"context": context, "now": now.isoformat()}
        if source not in self._known:
            request["source"] = source
        request["id"] = self._known.setdefault(source, len(self._known))
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = json.dumps(request, default=str).encode() + b"\n"
            process.stdin.write(line)
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
        reason = "too long a time" if slow else f"an end with status {status}"
        return {"error": reason, "limit": True}

    def _start(self) -> subprocess.Popen[bytes]:
        self._known = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__],
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
        fix="use a model with another chat_template.jinja, or mend a local copy of it; is one row very long?",
    )


PROCESS = TemplateProcess()
"""One for all templates of this process."""
