"""Secrets taken out of texts and data, whatever way they are spelled there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

from rnow.errors import RnowError

_MIN_LENGTH = 4
_LONG_LINE = 12
_DEPTH = 3  # a text in JSON in an error's repr
_ESCAPES: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: ascii(text)[1:-1],
    # In a longer text that holds both kinds of quotes.
    lambda text: repr(f"\"'{text}")[4:-1],
    lambda text: ascii(f"\"'{text}")[4:-1],
)
_USER_INFO = re.compile(r"(?<=://)[^\s/?#@]*@")


class Redactor:
    """Puts ``[NAME]`` in the place of every secret value, the longest first.

    A value is known as it is, as JSON and Python's ``repr`` escape it (also one inside the other), and as a URL quotes it; of one with several lines, also each long line. Values under four characters are left: replacing
    "1" everywhere would hide the text and protect nothing.

    Attributes:
        longest: characters of the longest spelling.
    """

    def __init__(self, secrets: Mapping[str, str] | None = None) -> None:
        self._names: dict[str, str] = {}
        for name, value in sorted((secrets or {}).items()):
            # The name takes part in texts that may be JSON.
            shown = f"[{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}]"
            for spelling in spellings(value) if len(value) >= _MIN_LENGTH else ():
                self._names.setdefault(spelling, shown)
        ordered = sorted(self._names, key=len, reverse=True)
        self.longest = len(ordered[0]) if ordered else 0
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        """``text`` without the values. A text that is a JSON object or list stays one."""
        if self._pattern is None:
            return text
        changed = self._pattern.sub(lambda match: self._names[match[0]], text)
        if changed != text and text.lstrip()[:1] in ("{", "["):
            return self._still_json(text, changed)
        return changed

    def data(self, value: Any, *, keys: bool = False) -> Any:
        """A copy of JSON-like data, or of a record, with every text in it redacted; ``keys``: those of mappings too, which
        are left where they are words of a format."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {
                self(key) if keys and isinstance(key, str) else key: self.data(item, keys=keys)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            items = [self.data(item, keys=keys) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [field.name for field in dataclasses.fields(value) if field.init]
            return dataclasses.replace(
                value, **{name: self.data(getattr(value, name)) for name in fields}
            )
        return value

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors that a user is shown leave the block without the values."""
        try:
            yield
        except RnowError as error:
            error.rewrite(self)
            raise

    def _still_json(self, text: str, changed: str) -> str:
        """``changed``, or where a value took a quote of the JSON with it, the JSON with its texts redacted."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return changed
        try:
            json.loads(changed)
        except (ValueError, RecursionError):
            return json.dumps(self.data(data, keys=True), ensure_ascii=False)
        return changed


def spellings(value: str) -> set[str]:
    """How programs write ``value`` down."""
    lines = [line.strip() for line in value.splitlines()]
    plain = {value, *(line for line in lines if len(line) >= _LONG_LINE)}
    found = set(plain)
    for _ in range(_DEPTH):
        found |= {escape(text) for text in found for escape in _ESCAPES}
    for text in plain:
        raw = text.encode("utf-8", "surrogatepass")
        quoted = {quote(raw), quote(raw, safe=""), quote_plus(raw)}
        found |= quoted
        found |= {re.sub(r"%[0-9A-F]{2}", lambda match: match[0].lower(), word) for word in quoted}
    return found


def without_user_info(text: str) -> str:
    """``text`` with ``user:password@`` taken out of the URLs in it."""
    return _USER_INFO.sub("", text)
