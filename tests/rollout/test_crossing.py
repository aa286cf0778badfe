"""Answers of one tokenizer in the tokens of another."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import character_tokenizer
from tests.rollout.tokenizers import (
    KINDS,
    NASTY,
    byte_level,
    dropping_letters,
    known_bytes,
    sentencepiece,
)

from rnow.rollout.crossing import NO_CHUNK, Aligned, Coverage, Crossing, measure_coverage
from rnow.rollout.token_bytes import encode_plain


def crossing(student: Any, teacher: Any) -> Crossing:
    return Crossing(
        student=known_bytes(student),
        teacher=known_bytes(teacher),
        tokenizer=teacher,
        stop_ids=frozenset([student.eos_token_id]),
        end_id=teacher.eos_token_id,
    )


def pieces(tokenizer: Any, ids: Any) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(token) for token in ids]


def naive_chunks(ours: list[bytes], theirs: list[bytes]) -> tuple[list[int], list[int]]:
    """Take a token from the side that is behind, and close a chunk whenever both are equally far."""
    found: tuple[list[int], list[int]] = ([], [])
    at, taken, number = [0, 0], [0, 0], 0
    sides = (ours, theirs)
    while taken[0] < len(ours) or taken[1] < len(theirs):
        side = 0 if at[0] <= at[1] and taken[0] < len(ours) else 1
        at[side] += len(sides[side][taken[side]])
        found[side].append(number)
        taken[side] += 1
        if at[0] == at[1]:
            number += 1
    return found


def test_chunks_close_where_both_end() -> None:
    student, teacher = byte_level(merges=0), byte_level(merges=80)
    ids = [*encode_plain(student, "the cat"), student.eos_token_id]
    found = crossing(student, teacher).align(ids)
    assert pieces(teacher, found.token_ids) == ["the", "Ġcat", "<eos>"]
    assert found.ours == (0, 0, 0, 1, 1, 1, 1, 2)
    assert found.theirs == (0, 1, 2)
    back = crossing(teacher, student).align(found.token_ids)
    assert (back.ours, back.theirs) == (found.theirs, found.ours)


@given(st.text("the catsßé東🙂\n ▁", max_size=24), st.sampled_from([0, 20, 80, 200]))
def test_chunks_are_the_shortest_common_stretches(text: str, merges: int) -> None:
    student, teacher = byte_level(merges=40), byte_level(merges=merges)
    found = crossing(student, teacher).align(encode_plain(student, text))
    ours, theirs = known_bytes(student), known_bytes(teacher)
    expected = naive_chunks(
        [ours.of_id[token] or b"" for token in encode_plain(student, text)],
        [theirs.of_id[token] or b"" for token in found.token_ids],
    )
    assert (list(found.ours), list(found.theirs)) == expected
    assert list(found.token_ids) == encode_plain(teacher, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", NASTY)
def test_equal_tokenizers_read_alike(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = [*encode_plain(tokenizer, text), tokenizer.eos_token_id]
    found = crossing(tokenizer, tokenizer).align(ids)
    assert list(found.token_ids) == ids
    assert found.ours == found.theirs == tuple(range(len(ids)))


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("text", NASTY)
def test_every_pair_of_kinds(student: str, teacher: str, text: str) -> None:
    ours, theirs = KINDS[student], KINDS[teacher]
    text = text.replace("▁", "_")
    found = crossing(ours, theirs).align([*encode_plain(ours, text), ours.eos_token_id])
    assert list(found.token_ids) == [*encode_plain(theirs, text), theirs.eos_token_id]
    assert NO_CHUNK not in (*found.ours, *found.theirs)
    assert {*found.ours} == {*found.theirs}
    assert sorted(found.ours) == list(found.ours)


def test_a_token_that_the_tokenizer_would_not_have_chosen() -> None:
    """The student may spell a word; the teacher's tokenizer writes it as it does."""
    tokenizer = byte_level(merges=80)
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    found = crossing(tokenizer, tokenizer).align(spelled)
    assert pieces(tokenizer, found.token_ids) == ["the"]
    assert found.ours == (0, 0, 0)


# ---- ends ---------------------------------------------------------------------------------------------------------


def test_the_end_of_a_turn_is_the_end_of_the_other() -> None:
    student, teacher = byte_level(), sentencepiece()
    found = crossing(student, teacher).align([student.eos_token_id])
    assert found == Aligned(token_ids=(teacher.eos_token_id,), ours=(0,), theirs=(0,))
    nothing = crossing(student, teacher).align([])
    assert nothing == Aligned(token_ids=(), ours=(), theirs=())


def test_the_rest_of_a_letter_at_the_end_of_a_cut_answer_is_dropped() -> None:
    student = byte_level(merges=0)
    ids = encode_plain(student, "ab🙂")
    for kept, rest in ((5, 3), (4, 2), (3, 1)):
        found = crossing(student, byte_level()).align(ids[:kept])
        assert pieces(byte_level(), found.token_ids) == ["a", "b"]
        assert found.ours == (0, 1, *[NO_CHUNK] * rest)
        assert found.theirs == (0, 1)


def test_a_token_that_ends_within_a_letter_at_the_end() -> None:
    """The whole token is in no chunk, nor is what the teacher makes of its first half."""
    student = byte_level(merges=200)
    ours = known_bytes(student)
    torn = next(i for i, b in enumerate(ours.of_id) if b and b.startswith(b" ") and b[-1] >= 0xC2)
    found = crossing(student, byte_level(merges=0)).align([*encode_plain(student, "cat"), torn])
    assert found.ours[-1] == found.theirs[-1] == NO_CHUNK
    assert found.ours[0] == 0


def test_bytes_that_are_no_text_are_judged_one_by_one() -> None:
    student = byte_level(merges=0)
    lone = encode_plain(student, "é")[:1]
    ids = [*encode_plain(student, "a"), *lone, *encode_plain(student, "b"), student.eos_token_id]
    for teacher in (byte_level(), sentencepiece(prefix=False)):
        found = crossing(student, teacher).align(ids)
        table = known_bytes(teacher)
        assert [table.of_id[token] for token in found.token_ids[:-1]] == [b"a", b"\xc3", b"b"]
        assert found.ours == found.theirs == (0, 1, 2, 3)
    without = crossing(student, character_tokenizer()).align(ids)
    assert without.ours == (0, NO_CHUNK, NO_CHUNK, 2)
    # The same bytes at the end of an answer that was not cut are no rest of a letter.
    ended = crossing(student, byte_level()).align([*lone, student.eos_token_id])
    assert ended.ours == (0, 1)


def test_letters_that_the_teacher_has_no_token_for() -> None:
    student = byte_level(merges=0)
    teacher = sentencepiece(fallback=False, prefix=False)
    found = crossing(student, teacher).align(encode_plain(student, "the ñññ cat"))
    assert pieces(teacher, found.token_ids) == ["t", "he", "▁", "<unk>", "▁cat"]
    assert found.ours == (0, 1, 1, 2, *[NO_CHUNK] * 6, 4, 4, 4, 4)
    assert found.theirs == (0, 1, 2, NO_CHUNK, 4)
    assert measure_coverage([found]) == Coverage(tokens=14, covered=8, one_to_one=2, longest=4)


def test_a_text_that_the_teachers_normaliser_changes() -> None:
    student, teacher = byte_level(merges=0), byte_level(merges=80, normaliser="NFC")
    text = "the cafe\u0301 cat"
    found = crossing(student, teacher).align(encode_plain(student, text))
    assert list(found.token_ids) == encode_plain(teacher, text)
    assert NO_CHUNK not in found.ours
    sizes = [found.ours.count(number) for number in sorted({*found.ours})]
    assert list(accumulate(sizes))[-1] == len(text.encode())
    assert max(sizes) <= len(" cafe\u0301".encode())
    assert found.ours[:3] == (0, 0, 0)
    assert found.ours[-4:] == (found.ours[-1],) * 4


def test_letters_that_the_teachers_tokenizer_drops() -> None:
    student, teacher = byte_level(merges=0), dropping_letters()
    found = crossing(student, teacher).align(encode_plain(student, "ab é cd"))
    assert pieces(teacher, found.token_ids) == ["a", "b", " ", " ", "c", "d"]
    # A chunk that holds them is none.
    assert found.ours == (0, 1, 2, NO_CHUNK, NO_CHUNK, NO_CHUNK, 4, 5)


# ---- control tokens -----------------------------------------------------------------------------------------------


def test_a_control_token_is_the_teachers_of_that_name() -> None:
    student, teacher = byte_level(), sentencepiece(prefix=False)
    start = student.convert_tokens_to_ids("<start>")
    found = crossing(student, teacher).align([*encode_plain(student, "x"), start])
    assert pieces(teacher, found.token_ids) == ["x", "<start>"]
    assert found.ours == (0, 1)


def test_a_control_token_that_is_spelled_or_unknown_is_letters() -> None:
    student, teacher = byte_level(merges=0), sentencepiece(prefix=False)
    found = crossing(student, teacher).align(encode_plain(student, "<end>"))
    assert teacher.convert_tokens_to_ids("<end>") not in found.token_ids
    assert found.ours == (0, 1, 2, 3, 4)
    theirs = character_tokenizer()
    crossed = crossing(theirs, teacher).align([theirs.convert_tokens_to_ids("<|im_start|>")])
    assert crossed.ours == (0,)
    assert len(crossed.token_ids) == len("<|im_start|>")


# ---- sums ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_cut_to_the_teachers_window() -> None:
    found = Aligned(token_ids=(7, 8, 9), ours=(0, 0, 1), theirs=(0, 1, 1))
    assert found.cut(3) == found.cut(9) == found
    assert found.cut(2) == Aligned(token_ids=(7, 8), ours=(0, 0, -1), theirs=(0, -1))
    assert found.cut(-5) == Aligned(token_ids=(), ours=(-1, -1, -1), theirs=())


def test_coverage() -> None:
    found = [
        Aligned(token_ids=(1, 2, 3), ours=(0, 1, 1, 1, -1), theirs=(0, 1, -1)),
        Aligned(token_ids=(1, 2), ours=(0,), theirs=(0, 0)),
    ]
    assert measure_coverage(found) == Coverage(tokens=6, covered=5, one_to_one=1, longest=3)
    assert measure_coverage(found).suffices
    assert not Coverage(tokens=5, covered=2, one_to_one=0, longest=1).suffices
    assert Coverage(tokens=0, covered=0, one_to_one=0, longest=0).suffices
