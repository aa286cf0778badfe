"""Documents in windows: nothing is left out, nothing is there twice."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import character_tokenizer
from tests.rollout.families import OURS, byte_tokenizer

from rnow.rollout.documents import cut_windows, opening_ids


@given(st.integers(1, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_trained_on_once(length: int, window: int) -> None:
    document = list(range(length))
    pieces = list(cut_windows(document, window))
    trained = [token for ids, mask in pieces for token, on in zip(ids, mask, strict=True) if on]
    assert trained == document[1:]
    assert all(len(ids) <= window for ids, _ in pieces)
    for (before, _), (after, _) in pairwise(pieces):
        assert after[0] == before[-1], "its context"


def test_what_a_tokenizer_puts_before_a_text() -> None:
    assert opening_ids(character_tokenizer()) == ()
    tokenizer = byte_tokenizer(OURS, "<|im_end|>", ["<|im_start|>"])
    assert opening_ids(tokenizer) == ()
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|im_end|>",
        special_tokens=[("<|begin|>", begin), ("<|im_end|>", tokenizer.eos_token_id)],
    )
    assert opening_ids(tokenizer) == (begin,)
