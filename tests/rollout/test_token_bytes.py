"""The bytes behind token ids, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import character_tokenizer
from tests.rollout.tokenizers import (
    KINDS,
    NASTY,
    byte_level,
    known_bytes,
    lower_case_words,
    sentencepiece,
)

from rnow.rollout.token_bytes import byte_letters, encode_plain, read_token_bytes


def bytes_of(tokenizer: Any, text: str) -> bytes:
    found = known_bytes(tokenizer)
    return b"".join(piece or b"?" for piece in found.of_text(encode_plain(tokenizer, text)))


def test_the_letters_of_bytes() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_letters()) == sorted(ByteLevel.alphabet())
    assert [byte_letters()[byte] for byte in b"a !\n\xff"] == ["a", "Ġ", "!", "Ċ", "ÿ"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", NASTY)
def test_what_was_encoded_comes_back(kind: str, text: str) -> None:
    before = " " if kind == "sentencepiece" and text else ""
    # SentencePiece's own letter for a blank cannot be told from a blank.
    given = text.replace("▁", " ") if kind.startswith("sent") else text
    assert bytes_of(KINDS[kind], text) == (before + given).encode()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_any_text_comes_back(text: str) -> None:
    for kind, tokenizer in KINDS.items():
        before = " " if kind == "sentencepiece" and text else ""
        assert bytes_of(tokenizer, text) == (before + text).encode(), kind


def test_parts_of_a_letter() -> None:
    """A token that holds two of the three bytes of a letter cannot be decoded alone."""
    tokenizer = byte_level(merges=200)
    found = known_bytes(tokenizer)
    torn = [piece for piece in found.of_id if piece and b"\xe6" in piece and len(piece) == 2]
    assert torn
    assert "\ufffd" in torn[0].decode("utf-8", "replace")


def test_what_is_known_of_a_tokenizer() -> None:
    found = known_bytes(sentencepiece())
    assert found.blank_first
    assert found.get(found.controls["<end>"]) == b"<end>"
    assert found.get(10**6) is None
    unknown = found.controls["<unk>"]
    assert (found.unknown, found.get(unknown)) == (unknown, b"<unk>")
    assert found.of_text([unknown, found.controls["<end>"]]) == [None, b"<end>"]
    assert {found.of_id[token] for token in found.byte_ids.values()} == {
        bytes([byte]) for byte in range(0x80, 0x100)
    }
    cut = found.below(10)
    assert len(cut.of_id) == 10
    assert set(cut.byte_ids) == set()
    assert not known_bytes(byte_level()).blank_first


def test_a_vocabulary_without_all_letters() -> None:
    """Words with an unknown token say nothing about the others."""
    tokenizer = character_tokenizer()
    found = known_bytes(tokenizer)
    assert bytes_of(tokenizer, "a b\n~é") == b"a b\n~?"
    assert found.byte_ids == {}


def test_a_normaliser_of_unicode_is_no_obstacle() -> None:
    assert bytes_of(byte_level(normaliser="NFC"), "cafe\u0301") == "café".encode()


def test_a_tokenizer_that_loses_text() -> None:
    assert read_token_bytes(lower_case_words()) is None
    assert read_token_bytes(character_tokenizer(), ["naïve text is fine"]) is not None
