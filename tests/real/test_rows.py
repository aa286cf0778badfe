"""Masks and documents with a real tokenizer and its own template: SmolLM2's, from ``scripts/fetch_smollm2.py``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rnow.models.tokenizer import encode_texts, stop_token_ids
from rnow.rollout.documents import cut_windows, opening_ids
from rnow.rollout.masks import MaskedConversation, mask_conversations

pytestmark = pytest.mark.real

FOLDER = Path(__file__).resolve().parents[2] / "real-models" / "student"
SAID = ("The capital is Paris.", "\n\nIt has 2.1 million people.", "")
ROW = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": SAID[0]},
    {"role": "user", "content": "How many people?"},
    {"role": "assistant", "content": SAID[1]},
    {"role": "user", "content": "Say nothing."},
    {"role": "assistant", "content": SAID[2]},
]


def test_the_loss_is_on_each_answer_and_its_end() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    (found,) = mask_conversations(
        tokenizer,
        [(ROW, None)],
        partial(encode_texts, tokenizer),
        stop_ids=stop_token_ids(tokenizer, FOLDER),
    )
    assert isinstance(found, MaskedConversation)
    trained: list[list[int]] = [[]]
    for token, on in zip(found.token_ids, found.loss_mask, strict=True):
        if on:
            trained[-1].append(token)
        elif trained[-1]:
            trained.append([])
    # An answer's tokens are those that the sampler could have drawn after its opening.
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trained == [[*tokenizer.encode(said, add_special_tokens=False), end] for said in SAID]
    whole = tokenizer.apply_chat_template(ROW, tokenize=False)
    assert tokenizer.decode(found.token_ids) == whole.rstrip("\n")


def test_a_document_is_its_tokens_and_an_end() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    text = "A naïve café. " * 40
    ids = tokenizer.encode(text)
    pieces = [*cut_windows((*opening_ids(tokenizer), *ids, tokenizer.eos_token_id), 50)]
    trained = [t for tokens, mask in pieces for t, on in zip(tokens, mask, strict=True) if on]
    assert trained == [*ids[1:], tokenizer.eos_token_id]
