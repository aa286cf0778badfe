"""The words between the processes: cut anywhere, never larger than agreed, and not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.text.redact import Redactor
from rnow.usercode import frames
from rnow.usercode.environment import plainly_secret
from rnow.usercode.host import CallOutcome, read_outcome
from rnow.usercode.inbox import make_inbox, put, take
from rnow.usercode.processes import Entry, family

MESSAGES = st.lists(
    st.builds(
        frames.pack,
        st.sampled_from([frames.CALL, frames.RESULT, frames.LOG]),
        call=st.integers(0, 2**64 - 1),
        function=st.integers(0, 2**16 - 1),
        seconds=st.floats(0, 1e6),
        body=st.binary(max_size=50),
    ),
    max_size=8,
)


@given(MESSAGES, st.integers(1, 40))
def test_a_stream_cut_anywhere_gives_the_same_messages(messages: list[bytes], size: int) -> None:
    stream, reader = b"".join(messages), frames.FrameReader()
    found = [
        message
        for start in range(0, len(stream), size)
        for message in reader.feed(stream[start : start + size])
    ]
    assert found == messages
    assert [frames.pack(k, call=c, function=f, seconds=s, body=b) for k, c, f, s, b in map(frames.unpack, found)] == messages  # fmt: skip


def test_what_is_too_large_is_refused_before_it_arrives() -> None:
    reader = frames.FrameReader(max_body=10)
    assert len(list(reader.feed(frames.pack(frames.LOG, body=b"x" * 10)))) == 1
    with pytest.raises(frames.BadFrame, match="11 bytes"):
        list(reader.feed(frames.pack(frames.LOG, body=b"x" * 11)[:24]))


@pytest.mark.parametrize("size", [0, 32_000, 33_000, 2_000_000])
def test_an_inbox_keeps_order_and_gives_each_message_once(size: int) -> None:
    inbox, mine = make_inbox()
    theirs = mine.dup()
    with inbox, mine, theirs:
        messages = [frames.pack(frames.CALL, call=n, body=b"x" * size) for n in range(3)]
        for message in messages:
            put(inbox, message)
        assert take(mine, wait=True) == messages[0]
        assert take(theirs, wait=False) == messages[1]
        assert take(mine, wait=False) == messages[2]
        with pytest.raises(BlockingIOError):
            take(theirs, wait=False)
        inbox.close()
        assert take(mine, wait=True) == b""


def test_a_full_inbox_does_not_wait() -> None:
    inbox, mine = make_inbox()
    message = frames.pack(frames.CALL, body=b"x" * 10_000)

    def fill() -> None:
        for _ in range(10_000):
            put(inbox, message)

    with inbox, mine, pytest.raises(BlockingIOError):
        fill()


def outcome_of(body: bytes, hidden_in_value: Mapping[str, str] | None = None) -> CallOutcome:
    return read_outcome(
        body,
        timeout=1,
        file=Path("tools.py"),
        redact=Redactor(),
        redact_value=Redactor(hidden_in_value),
    )


def test_a_workers_limits_are_held_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "RESULT_BYTES", 7)
    body = json.dumps({"value": "é" * 10, "omitted": 5}).encode()
    outcome = outcome_of(body)
    assert (outcome.value, outcome.omitted) == ("ééé", 18)


def test_short_settings_are_not_taken_out_of_what_the_model_reads() -> None:
    hidden = {"LOG_LEVEL": "info", "API_KEY": "abcd", "PLACE": "somewhere-long"}
    body = json.dumps({"value": "info abcd somewhere-long"}).encode()
    outcome = outcome_of(body, hidden_in_value=plainly_secret(hidden))
    assert outcome.value == "info [API_KEY] [PLACE]"


def test_who_belongs_to_a_worker() -> None:
    table = {
        1: Entry(0, 1, True),
        10: Entry(1, 10, True),  # the worker
        11: Entry(10, 10, True),  # its child
        12: Entry(11, 12, True),  # a grandchild with its own session
        13: Entry(1, 12, True),  # an orphan of that session
        14: Entry(1, 10, True),  # an orphan of the worker's session
        15: Entry(10, 10, False),  # a zombie
        16: Entry(15, 10, True),  # a zombie's child
        20: Entry(1, 20, True),  # another worker
        21: Entry(20, 20, True),
        30: Entry(1, 0, True),
    }
    assert family(table, 10) == {11, 12, 13, 14, 16}
    assert family(table, 20) == {21}
    assert family(table, 99) == set()
