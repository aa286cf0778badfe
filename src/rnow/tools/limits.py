"""What a tool gave, made safe and small enough for a model to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rnow.types import ToolResult

MAX_BYTES = 256_000
"""UTF-8 bytes of a result that are ever tokenised."""

_REPLACEMENT = "\ufffd"
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLimit:
    """The longest result in tokens, and the tokenizer's two directions (no special tokens added, none dropped)."""

    limit: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutResult(ToolResult):
    """A result of which ``omitted`` bytes were left out before it came to us."""

    omitted: int = 0


def storable(text: str) -> str:
    """``text`` without NULs and lone surrogates, which tokenizers, JSON readers and files choke on; each becomes U+FFFD.

    Other control characters stay: a model may read them, and whoever prints text of a model escapes them.
    """
    return _UNSTORABLE.sub(_REPLACEMENT, text)


def shorten(
    text: str,
    *,
    max_bytes: int = MAX_BYTES,
    tokens: TokenLimit | None = None,
    omitted: int = 0,
) -> str:
    """``text`` within both limits, with a marker at the end that says what is missing.

    Bytes come first, so that the tokenizer never sees more than ``max_bytes`` of them. The marker comes on top of the
    limits. ``text`` must be storable; ``omitted`` bytes of it are missing already.
    """
    kept, size = _cut_bytes(text, max_bytes)
    marker = ""
    if kept is not text or omitted:
        marker = f"[... cut: {_size(kept):,} of {size + omitted:,} bytes shown]"
    # No token is shorter than a byte, so a short text needs no tokenizer.
    if tokens is not None and _size(kept) > tokens.limit:
        ids = tokens.encode(kept)
        if len(ids) > tokens.limit:
            whole = f"{len(ids):,}" if not marker else f"more than {len(ids):,}"
            kept = _cut_tokens(kept, ids, tokens)
            marker = f"[... cut: {tokens.limit:,} of {whole} tokens shown]"
    return f"{kept}\n{marker}" if marker else kept


def keep_end(text: str, max_characters: int) -> str:
    """The end of a text for people, where a traceback says what happened."""
    if len(text) <= max_characters:
        return text
    return f"[... cut: the last {max_characters:,} of {len(text):,} characters]\n{text[-max_characters:]}"


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _cut_bytes(text: str, limit: int) -> tuple[str, int]:
    size = _size(text)
    if size <= limit:
        return text, size
    return text.encode()[:limit].decode("utf-8", "ignore"), size


def _cut_tokens(text: str, ids: Sequence[int], tokens: TokenLimit) -> str:
    """The longest beginning of ``text`` that is within the limit, by decoding where that gives the text back."""
    kept = tokens.decode(ids[: tokens.limit]).rstrip(_REPLACEMENT)
    if text.startswith(kept):
        return kept
    # A tokenizer that normalises does not give its text back: look for the place in the text itself.
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokens.encode(text[:middle])) <= tokens.limit:
            low = middle
        else:
            high = middle - 1
    return text[:low]
