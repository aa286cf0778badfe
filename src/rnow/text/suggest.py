"""Did you mean: from a word that does not exist to the ones that do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_COMPARED = 100


def closest(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """At most ``count`` of the ``known`` words that ``word`` resembles, the best first; upper and lower case are alike.

    Args:
        cutoff: the least similarity, between 0 (any word) and 1 (the same letters).
    """
    import difflib  # only a mistake needs it, and `rnow --help` must stay quick

    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    found = difflib.get_close_matches(word[:_COMPARED].lower(), by_lower, n=count, cutoff=cutoff)
    return [by_lower[key] for key in found]


def did_you_mean(words: Sequence[str]) -> str:
    """``did you mean a or b?``, or "" without words."""
    return f"did you mean {' or '.join(words)}?" if words else ""


def hint(word: str, known: Iterable[str]) -> str:
    """`` (did you mean x?)`` for the closest known word, or "" when none is close."""
    found = closest(word, known)
    return f" ({did_you_mean(found)})" if found else ""
