"""Which samples share a row of a forward pass: what several of them begin with is computed once, and short ones fill a row
together. Arithmetic on token ids; no tensor.

A row holds samples one after another, each from where it departs from the one before it. So the samples of a row are the
branches of a tree, written depth first: a token sees those before it whose subtree it is in, and its position is its depth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

Pass = tuple[tuple[int, ...], ...]
"""The rows of one forward pass, each the indices of the samples in it."""

PASS_OVERHEAD = 128
"""Tokens that a model computes in the time that one more pass costs whatever is in it."""
MAX_ROW_TOKENS = 4096
"""A row of several samples is no longer: the mask of a pass has as many entries for each of its tokens."""
MAX_PADDING = 0.03
"""Share of a pass that may be padding."""
_SAMPLES_A_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive tokens of a row that are one node of its tree, or a part of one.

    Attributes:
        start: index in the row of its first token.
        depth: that token's position in every sample that it belongs to.
        count: its tokens.
    """

    start: int
    depth: int
    count: int

    @property
    def bottom(self) -> int:
        """The position after its last token."""
        return self.depth + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Where the tokens of a row are.

    Attributes:
        token_ids, positions: of each of its T tokens.
        ends: for each token the index in the row where its subtree ends: query i sees key j where ``j <= i < ends[j]``.
        places: for each sample the index in the row of each of its tokens.
    """

    token_ids: list[int]
    positions: list[int]
    ends: list[int]
    places: tuple[list[int], ...]


def lay_out(sequences: Sequence[Sequence[int]]) -> RowLayout:
    """One row of these sequences, each from where it departs from the one before it. In sorted order nothing that two of
    them begin with is there twice."""
    token_ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    places: list[list[int]] = []
    path: list[Run] = []
    before: Sequence[int] = ()
    for sequence in sequences:
        shared, here = common_prefix(before, sequence), len(token_ids)
        path = _close(path, shared, here, ends)
        new = len(sequence) - shared
        token_ids += sequence[shared:]
        positions += range(shared, len(sequence))
        ends += [0] * new
        path.append(Run(start=here, depth=shared, count=new))
        places.append([i for run in path for i in range(run.start, run.start + run.count)])
        before = sequence
    _close(path, 0, len(token_ids), ends)
    return RowLayout(token_ids=token_ids, positions=positions, ends=ends, places=tuple(places))


def _close(path: list[Run], depth: int, here: int, ends: list[int]) -> list[Run]:
    """The runs above ``depth``; those below, whose subtree ends ``here``, are written into ``ends``."""
    kept: list[Run] = []
    for run in path:
        above = min(max(depth - run.depth, 0), run.count)
        if above:
            kept.append(Run(start=run.start, depth=run.depth, count=above))
        ends[run.start + above : run.start + run.count] = [here] * (run.count - above)
    return kept


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; compared slice by slice, not token by token."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def plan_passes(
    sequences: Sequence[Sequence[int]],
    outputs: Sequence[int],
    *,
    max_tokens: int,
    cells_per_token: float,
) -> list[Pass]:
    """The cheapest passes found for all sequences; it depends on nothing but them.

    Args:
        outputs: how many states of each sequence are read. Those that several share count for each.
        max_tokens: of one pass, padding included, and of the states that are read, if a single sequence has not more.
        cells_per_token: so many pairs of tokens does attention weigh in the time of one token in the rest of the model: a row
            twice as long costs twice as much of it.
    """
    order = sorted(range(len(sequences)), key=lambda index: (sequences[index], index))
    lengths = [len(sequences[index]) for index in order]
    shared = [0] + [common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    plan = plan_lengths(
        lengths,
        shared,
        [outputs[index] for index in order],
        max_tokens=max_tokens,
        cells_per_token=cells_per_token,
    )
    return [tuple(tuple(order[i] for i in row) for row in rows) for rows in plan]


def plan_lengths(
    lengths: Sequence[int],
    shared: Sequence[int],
    outputs: Sequence[int],
    *,
    max_tokens: int,
    cells_per_token: float,
) -> list[Pass]:
    """``plan_passes`` for sorted sequences of which only the lengths are known, and how many tokens each shares with the one
    before it."""
    limit = min(max_tokens, MAX_ROW_TOKENS)
    units = _cut(lengths, shared, outputs, limit, cells_per_token)
    sizes = [lengths[unit[0]] + sum(lengths[i] - shared[i] for i in unit[1:]) for unit in units]
    # Longest first: running out of memory happens at once or not at all.
    order = sorted(range(len(units)), key=lambda index: (-sizes[index], index))
    passes: list[Pass] = []
    while order:
        read = [sum(outputs[i] for i in units[index]) for index in order]
        most = min(
            _fitting([sizes[index] for index in order], max_tokens), _fitting(read, max_tokens)
        )
        largest = [sizes[index] for index in order[:most]]
        taken, bins = _fill(largest, max_tokens, limit, cells_per_token)
        rows = [sorted(i for unit in row for i in units[order[unit]]) for row in bins]
        passes.append(tuple(map(tuple, rows)))
        order = order[taken:]
    return passes


def row_tokens(lengths: Sequence[int], shared: Sequence[int], row: Sequence[int]) -> int:
    """Tokens of a row of sorted sequences; ``lengths`` and ``shared`` as ``plan_lengths`` takes them."""
    new = (lengths[b] - min(shared[a + 1 : b + 1]) for a, b in pairwise(row))
    return lengths[row[0]] + sum(new)


def _cost(tokens: float, cells: float, cells_per_token: float) -> float:
    return tokens + cells / cells_per_token


def _cut(
    lengths: Sequence[int],
    shared: Sequence[int],
    outputs: Sequence[int],
    limit: int,
    cells_per_token: float,
) -> list[range]:
    """Cut the sorted sequences into those that are computed together, at the least cost in all."""
    best, cut = [0.0], [0]
    for last in range(len(lengths)):
        # Alone it needs no mask, and half of the cells are skipped.
        found, at = (
            best[last] + _cost(lengths[last], lengths[last] ** 2 / 2, cells_per_token),
            last,
        )
        size, read = lengths[last], outputs[last]
        for first in range(last - 1, -1, -1):
            # The new first one in full, instead of what the one after it adds.
            size, read = size + lengths[first] - shared[first + 1], read + outputs[first]
            if not shared[first + 1] or max(size, read) > limit:
                break
            cost = best[first] + _cost(size, size**2, cells_per_token)
            if cost < found:
                found, at = cost, first
        best.append(found)
        cut.append(at)
    units: list[range] = []
    end = len(lengths)
    while end:
        units.append(range(cut[end], end))
        end = cut[end]
    return units[::-1]


def _fill(
    sizes: Sequence[int], max_tokens: int, limit: int, cells_per_token: float
) -> tuple[int, list[list[int]]]:
    """Of units that would fit, longest first: how many make the next pass, and the rows they make, at the least cost for each
    token."""
    best: tuple[float, int, list[list[int]]] | None = None
    for count in _fewer(len(sizes)):
        tokens = sum(sizes[:count])
        for rows in dict.fromkeys(-(-count // each) for each in _SAMPLES_A_ROW):
            bins, width = _spread(sizes[:count], rows)
            padded = rows * width
            too_long = rows < count and width > limit
            if (
                too_long
                or padded > max(max_tokens, width)
                or padded - tokens > MAX_PADDING * padded
            ):
                continue
            cost = (PASS_OVERHEAD + _cost(padded, padded * width, cells_per_token)) / tokens
            if best is None or cost < best[0]:
                best = (cost, count, bins)
    assert best is not None, "one unit alone has no padding"
    return best[1], best[2]


def _fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first ones fit together, one at least."""
    count = bisect_right([*accumulate(sizes)], room)
    return max(1, count)


def _fewer(most: int) -> Iterator[int]:
    while most:
        yield most
        most = most * 4 // 5


def _spread(sizes: Sequence[int], rows: int) -> tuple[list[list[int]], int]:
    """Each unit, longest first, into the row that is shortest so far; and the longest row's length."""
    heap = [(0, row) for row in range(rows)]
    heapify(heap)
    bins: list[list[int]] = [[] for _ in range(rows)]
    for index, size in enumerate(sizes):
        length, row = heap[0]
        bins[row].append(index)
        heapreplace(heap, (length + size, row))
    return bins, max(length for length, _ in heap)
