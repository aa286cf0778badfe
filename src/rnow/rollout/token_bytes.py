"""The bytes behind each token id.

Tokenizers write bytes in alphabets of their own: GPT-2's 256 letters, SentencePiece's ``▁`` and ``<0x0A>``. What a token stands
for is read off its piece, since a token that holds a part of a letter cannot be decoded alone. Whether an alphabet was read
rightly is found out on text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rnow.protocols import Tokenizer

_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD = re.compile(r"\s*\S+|\s+")

_PROBE = (
    "The quick  brown fox:\t3.14\n\n\tdef f(x):   return x ** 2  # don't\r\n naïve cafe\u0301 東京タワー Привет สวัสดี "
    "👩\u200d👩\u200d👧 🇫🇷 a\u0308\u0323 \u00a0 \u3000 ﬁ 한국어 "
    # The letters that a byte could be written as, which a vocabulary of plain letters may hold too.
) + " ".join(map(chr, range(0xA1, 0x144)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """What the ids of one tokenizer stand for.

    Attributes:
        of_id: bytes by id; None for ids without a piece. A control token stands for its name.
        unknown: the token of what the tokenizer cannot write; None without one.
        added: the ids of added tokens, control tokens among them, and ``controls``: their contents -> their ids.
        byte_ids: bytes that are no ASCII letter -> the ids of the tokens that are such a byte alone.
        blank_first: a text is read as if it began with a blank (SentencePiece's dummy prefix).
    """

    of_id: Sequence[bytes | None]
    unknown: int | None
    added: frozenset[int]
    controls: Mapping[str, int]
    byte_ids: Mapping[int, int]
    blank_first: bool

    def below(self, vocabulary: int) -> TokenBytes:
        """Without the ids from ``vocabulary`` on."""
        return replace(
            self,
            of_id=self.of_id[:vocabulary],
            controls={text: i for text, i in self.controls.items() if i < vocabulary},
            byte_ids={byte: i for byte, i in self.byte_ids.items() if i < vocabulary},
        )

    def get(self, token_id: int) -> bytes | None:
        """Bytes of one id, as ``of_id``; None beyond the vocabulary."""
        return self.of_id[token_id] if token_id < len(self.of_id) else None

    def of_text(self, token_ids: Iterable[int]) -> list[bytes | None]:
        """Bytes of ids that a text was encoded to; None for an unknown token too."""
        return [None if token == self.unknown else self.get(token) for token in token_ids]


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what somebody wrote: special tokens that it spells stay letters, and none is added."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def read_token_bytes(tokenizer: Tokenizer, texts: Iterable[str] = ()) -> TokenBytes | None:
    """The bytes behind a tokenizer's ids, or None where its pieces do not give back what was encoded.

    Args:
        texts: of the run, on which it must hold besides a text of the hard cases. Words with an unknown token, or of which
            the tokenizer drops letters, are left out; a normaliser may write letters in another form of Unicode.
    """
    words = [word for text in (_PROBE, *texts) for word in _WORD.findall(text)]
    encoded = [(word, encode_plain(tokenizer, word)) for word in dict.fromkeys(words)]
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = [
        (word, ids)
        for word, ids in encoded
        if unknown not in ids and not _loses_letters(tokenizer, word, ids)
    ]
    for table in _readings(tokenizer):
        if known and all(_gives_back(table, word, ids) for word, ids in known):
            return _described(tokenizer, table, unknown)
    return None


def _loses_letters(tokenizer: Tokenizer, word: str, ids: Sequence[int]) -> bool:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if len(text) >= len(word) or text == word.removeprefix(" "):
        return False
    rest = iter(word)
    return all(letter in rest for letter in text)


def _gives_back(table: Sequence[bytes | None], word: str, ids: Sequence[int]) -> bool:
    pieces = [table[token] if token < len(table) else None for token in ids]
    if None in pieces:
        return False
    written = b"".join(piece for piece in pieces if piece is not None)
    if written in (word.encode(), b" " + word.encode()):
        return True
    text = _plain(written.decode("utf-8", "replace"))
    return text in (_plain(word), " " + _plain(word))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _described(
    tokenizer: Tokenizer, table: Sequence[bytes | None], unknown: int | None
) -> TokenBytes:
    controls = tokenizer.get_added_vocab()
    added = frozenset(controls.values())
    first = [table[token] or b"" for token in encode_plain(tokenizer, "a")]
    return TokenBytes(
        of_id=tuple(table),
        unknown=unknown,
        added=added,
        controls=controls,
        byte_ids={
            piece[0]: token
            for token, piece in enumerate(table)
            if piece is not None and len(piece) == 1 and piece[0] >= 0x80 and token not in added
        },
        blank_first=b"".join(first).startswith(b" "),
    )


def _readings(tokenizer: Tokenizer) -> Iterator[list[bytes | None]]:
    """What the ids may stand for, the likeliest first."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    size = max([len(tokenizer) - 1, *vocabulary.values(), *added.values()]) + 1
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    fallback = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))

    def by_letters(piece: str) -> bytes | None:
        values = [letters.get(letter, -1) for letter in piece]
        return None if -1 in values else bytes(values)

    def by_blanks(piece: str) -> bytes | None:
        if fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8", "surrogatepass")

    for read in (by_letters, by_blanks):
        table: list[bytes | None] = [None] * size
        for piece, token in vocabulary.items():
            table[token] = read(piece)
        for piece, token in added.items():
            table[token] = (by_blanks(piece) if read is by_blanks else None) or piece.encode()
        yield table
    yield _by_decoding(tokenizer, size, added)


def _by_decoding(tokenizer: Tokenizer, size: int, added: Mapping[str, int]) -> list[bytes | None]:
    """Each id as it is decoded after another: alone it might lose a blank."""
    before = encode_plain(tokenizer, "a")
    text = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    table: list[bytes | None] = [None] * size
    for token in range(size):
        both = tokenizer.decode([*before, token], clean_up_tokenization_spaces=False)
        if both.startswith(text) and "\ufffd" not in both:
            table[token] = both[len(text) :].encode("utf-8", "surrogatepass")
    for piece, token in added.items():
        table[token] = piece.encode()
    return table


def byte_letters() -> list[str]:
    """The letters that byte-level tokenizers write bytes 0 to 255 as, in that order (A. Radford et al. 2019, GPT-2's
    ``bytes_to_unicode``): a byte that Latin-1 prints is that letter, the others take letters from 256 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
