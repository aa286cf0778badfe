"""Documents as sequences of tokens: every token of a text is trained on exactly once, however long the text is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rnow.protocols import Tokenizer

_PROBE = "a"


def opening_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer writes before a text of its own accord (Llama's ``<|begin_of_text|>``); empty for most."""
    plain = tokenizer.encode(_PROBE, add_special_tokens=False)
    added = tokenizer.encode(_PROBE)
    places = range(len(added) - len(plain) + 1)
    at = next((at for at in places if added[at : at + len(plain)] == plain), 0)
    return tuple(added[:at])


def cut_windows(
    token_ids: Sequence[int], window: int
) -> Iterator[tuple[Sequence[int], tuple[bool, ...]]]:
    """A document in sequences of at most ``window`` tokens, at least 2, each with its loss mask.

    A window begins with the last token of the one before it, as its context: so each token but the document's first, which
    nothing precedes, is a loss token of exactly one window.
    """
    start = 0
    while True:
        piece = token_ids[start : start + window]
        yield piece, (False, *[True] * (len(piece) - 1))
        start += window - 1
        if start + 1 >= len(token_ids):
            return
