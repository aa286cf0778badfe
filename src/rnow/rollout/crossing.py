"""One answer in the tokens of two models: where their ends meet, a chunk ends.

The student's tokens say which bytes it wrote; the teacher's tokenizer cuts the same bytes into tokens of its own. A chunk is
the shortest stretch that both cut out, and the only thing to which both give a probability.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import accumulate

from rnow.protocols import Tokenizer
from rnow.rollout.token_bytes import TokenBytes, encode_plain

NO_CHUNK = -1

_ESCAPED = re.compile("([\udc80-\udcff])")
_REPLACEMENT = "\ufffd".encode()
_UNKNOWN = b"\xff"  # in no text
_UNIT = re.compile(rb"[!-~]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")
"""Words of ASCII, other letters, blanks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """An answer as both models read it.

    Attributes:
        token_ids: the teacher's.
        ours: for each of the student's tokens the number of its chunk, or ``NO_CHUNK``.
        theirs: the same for each of the teacher's.
    """

    token_ids: tuple[int, ...]
    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def cut(self, count: int) -> Aligned:
        """With the first ``count`` of the teacher's tokens alone. A chunk that loses one is none."""
        lost = {*self.theirs[max(0, count) :]}
        if not lost:
            return self
        ours, theirs = (
            tuple(NO_CHUNK if number in lost else number for number in numbers)
            for numbers in (self.ours, self.theirs[: max(0, count)])
        )
        return Aligned(token_ids=self.token_ids[: max(0, count)], ours=ours, theirs=theirs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How well the tokens of several answers fit together.

    Attributes:
        tokens: the student's.
        covered: those in a chunk.
        one_to_one: those whose chunk is one token of each model.
        longest: the student's tokens in the largest chunk.
    """

    tokens: int
    covered: int
    one_to_one: int
    longest: int

    @property
    def suffices(self) -> bool:
        """Whether at least half of the tokens are covered."""
        return 2 * self.covered >= self.tokens


def measure_coverage(answers: Iterable[Aligned]) -> Coverage:
    """Counts over all ``answers``."""
    tokens = covered = alone = longest = 0
    for answer in answers:
        theirs = Counter(answer.theirs)
        for chunk, size in Counter(answer.ours).items():
            if chunk != NO_CHUNK:
                covered += size
                alone += size == theirs[chunk] == 1
                longest = max(longest, size)
        tokens += len(answer.ours)
    return Coverage(tokens=tokens, covered=covered, one_to_one=alone, longest=longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """From the student's tokens to those of a teacher with another tokenizer.

    Attributes:
        student: the bytes of the student's tokens.
        teacher: those of the teacher's.
        tokenizer: the teacher's.
        stop_ids: all that end the student's turn.
        end_id: what ends the teacher's: every stop of the student is this one.
    """

    student: TokenBytes
    teacher: TokenBytes
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    end_id: int

    def align(self, token_ids: Sequence[int]) -> Aligned:
        """One answer of the student, the id that ended it included.

        What is left of a letter where an answer was cut is in no chunk; nor is what the teacher's tokenizer cannot express.
        """
        ended = bool(token_ids) and token_ids[-1] in self.stop_ids
        written = token_ids[:-1] if ended else token_ids
        pieces = self._pieces(written)
        ends = list(accumulate(map(len, pieces)))
        reading = _Reading(crossing=self)
        data = b""
        for token, piece in zip(written, pieces, strict=True):
            if (control := self._control(token, piece)) is None:
                data += piece
                continue
            reading.text(data, complete=True)
            reading.control(control, len(piece))
            data = b""
        reading.text(data, complete=ended)

        common = sorted({*ends} & {end for end in reading.ends if end is not None})
        torn = {bisect_left(common, hole) for hole in reading.holes}
        chunk = [_chunk(common, end, torn) for end in ends]
        theirs = [_chunk(common, end, torn) for end in _known_ends(reading.ends)]
        if ended:
            chunk.append(len(common))
            theirs.append(len(common))
        found = [*reading.token_ids, *[self.end_id] * ended]
        return Aligned(token_ids=tuple(found), ours=tuple(chunk), theirs=tuple(theirs))

    def _pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of the student's tokens, without the blank that its tokenizer puts before a text."""
        pieces = [
            _REPLACEMENT if (piece := self.student.get(token)) is None else piece
            for token in token_ids
        ]
        if pieces and self.student.blank_first:
            pieces[0] = pieces[0].removeprefix(b" ")
        return pieces

    def _control(self, token: int, piece: bytes) -> int | None:
        """The teacher's id of an added token of the student's, where it has one of the same name."""
        if token not in self.student.added:
            return None
        return self.teacher.controls.get(piece.decode("utf-8", "replace"))


@dataclass(slots=True)
class _Reading:
    """The teacher's tokens of an answer, as far as it was read.

    Attributes:
        ends: for each token the byte of the answer at which it ends; None where that is not known.
        holes: bytes of the answer, counted from 1, that no token stands for.
    """

    crossing: Crossing
    token_ids: list[int] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    holes: list[int] = field(default_factory=list)
    at: int = 0

    def control(self, token: int, size: int) -> None:
        """One token of its own."""
        self.at += size
        self.token_ids.append(token)
        self.ends.append(self.at)

    def text(self, data: bytes, *, complete: bool) -> None:
        """What the student wrote: text, and bytes that are none, each a token where the teacher has it."""
        # Bytes that cannot be decoded come out as one surrogate each; those of a letter not ended yet stay inside.
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        for part in _ESCAPED.split(decoder.decode(data, final=complete)):
            if _ESCAPED.fullmatch(part):
                self._byte(ord(part) - 0xDC00)
            elif part:
                self._run(part)

    def _byte(self, value: int) -> None:
        token = self.crossing.teacher.byte_ids.get(value)
        if token is None:
            self.at += 1
            self.holes.append(self.at)
        else:
            self.control(token, 1)

    def _run(self, text: str) -> None:
        ids, run = encode_plain(self.crossing.tokenizer, text), text.encode()
        ends, holes = _find_ends(self.crossing.teacher.of_text(ids), run)
        self.token_ids += ids
        self.ends += [None if end is None else self.at + end for end in ends]
        self.holes += [self.at + hole for hole in holes]
        self.at += len(run)


def _find_ends(pieces: Sequence[bytes | None], run: bytes) -> tuple[list[int | None], list[int]]:
    """The byte of ``run`` at which each piece ends, and bytes that no piece or an unknown token stands for.

    A normaliser may have changed the text, and an unknown token (None) has no bytes: then ends are known in what is the same
    on both sides, and after each change.
    """
    known = [_UNKNOWN if piece is None else piece for piece in pieces]
    written = b"".join(known)
    if written != run and written.startswith(b" ") and (written[1:] == run or run[:1] != b" "):
        # The blank that the tokenizer puts before a text.
        known[0], written = known[0].removeprefix(b" "), written[1:]
    ends = list(accumulate(map(len, known)))
    if written == run:
        return [*ends], []
    theirs, ours = _UNIT.findall(written), _UNIT.findall(run)
    starts, places = [0, *accumulate(map(len, theirs))], [0, *accumulate(map(len, ours))]
    spots, holes = {0: 0}, list[int]()
    for tag, i, after, j, end in SequenceMatcher(None, theirs, ours).get_opcodes():
        if tag == "equal":
            spots |= {starts[i] + n: places[j] + n for n in range(1, starts[after] - starts[i] + 1)}
            continue
        if tag == "insert" or _UNKNOWN in b"".join(theirs[i:after]):
            holes.append(places[end])
        if tag != "insert":
            spots[starts[after]] = places[end]
    return [spots.get(end) for end in ends], holes


def _known_ends(ends: Sequence[int | None]) -> list[int | None]:
    """An end that is not known stands for the next that is: the token is in the same chunk."""
    found: list[int | None] = []
    after: int | None = None
    for end in reversed(ends):
        after = after if end is None else end
        found.append(after)
    return found[::-1]


def _chunk(common: Sequence[int], end: int | None, torn: set[int]) -> int:
    number = len(common) if end is None else bisect_left(common, end)
    return NO_CHUNK if number == len(common) or number in torn else number
