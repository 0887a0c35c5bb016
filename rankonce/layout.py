"""Where every token of a pass stands: spans, positions and score rows.

A pass is a row of T tokens: for each request its prefix (unless its keys and values are cached)
and then its segments. The keys and values of cached prefixes stand in front, so that key row
``S - T + t`` belongs to token ``t``.

    keys     [cached prefix of request 2][prefix 1][segment][segment][segment 2][segment 2]
    tokens                               [prefix 1][segment][segment][segment 2][segment 2]

A prefix is a span that sees nothing before itself; a segment is a span that also sees its prefix.
Positions of a segment go on from the end of its prefix, whatever stands between them in the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class TokenizedRequest:
    """A rendered request as token ids.

    Attributes:
        prefix_ids: tokens that all candidates share.
        segment_ids: one tuple of tokens a candidate; the last token's row gives its score.
        label_ids: for every label the token ids that count as it, at least one each.
        adapter: whose weights its passes run with; ``None`` is the backbone alone.
    """

    prefix_ids: tuple[int, ...]
    segment_ids: tuple[tuple[int, ...], ...]
    label_ids: tuple[tuple[int, ...], ...]
    adapter: str | None = None

    @property
    def separate_tokens(self) -> int:
        """Tokens of one prompt per candidate."""
        return sum(len(self.prefix_ids) + len(segment) for segment in self.segment_ids)


@dataclass(frozen=True, kw_only=True)
class PassPart:
    """The part of one request that goes into a pass.

    Attributes:
        request: index of the request.
        first, last: its candidates, half-open.
        cached: the prefix's keys and values are known and stand in front of the tokens.
    """

    request: int
    first: int
    last: int
    cached: bool


@dataclass(frozen=True, kw_only=True)
class SegmentLayout:
    """Spans of one pass as arrays over its N spans, half-open token and key ranges.

    Attributes:
        query_start, query_end: a span's tokens, in 0..T.
        key_start, key_end: key rows of the span's tokens.
        prefix_start, prefix_end: key rows of the prefix it sees; empty for a prefix itself.
        positions_T: position of every token in its own prompt.
        score_rows_C: the last token of every segment, in the order of the parts.
        num_keys: S, the cached key rows and one for every token.
    """

    query_start: NDArray[np.int64]
    query_end: NDArray[np.int64]
    key_start: NDArray[np.int64]
    key_end: NDArray[np.int64]
    prefix_start: NDArray[np.int64]
    prefix_end: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    score_rows_C: NDArray[np.int64]
    num_keys: int

    @property
    def num_tokens(self) -> int:
        """T, the tokens that go through the model."""
        return len(self.positions_T)


def lay_out_pass(
    parts: Sequence[PassPart],
    prefix_lengths: Sequence[int],
    segment_lengths: Sequence[Sequence[int]],
    *,
    cached_rows: int = 0,
) -> SegmentLayout:
    """Place the parts of a pass one after another.

    Args:
        parts: what goes into the pass, in this order.
        prefix_lengths: tokens of each part's prefix.
        segment_lengths: tokens of each part's segments.
        cached_rows: key rows reserved for cached prefixes, if more than they need.
    """
    needed = sum(n for part, n in zip(parts, prefix_lengths, strict=True) if part.cached)
    num_cached = max(needed, cached_rows)
    spans: list[tuple[int, int, int, int, int]] = []
    first_positions: list[int] = []
    score_rows: list[int] = []
    row, cached_row = 0, 0
    for part, prefix_length, lengths in zip(parts, prefix_lengths, segment_lengths, strict=True):
        if part.cached:
            prefix_start = cached_row
            cached_row += prefix_length
        else:
            prefix_start = num_cached + row
            if prefix_length:
                spans.append((row, row + prefix_length, prefix_start, 0, 0))
                first_positions.append(0)
            row += prefix_length
        for length in lengths:
            spans.append(
                (row, row + length, num_cached + row, prefix_start, prefix_start + prefix_length)
            )
            first_positions.append(prefix_length)
            row += length
            score_rows.append(row - 1)
    columns = np.array(spans, dtype=np.int64).reshape(-1, 5).T
    shifts = np.array(first_positions, dtype=np.int64) - columns[0]
    return SegmentLayout(
        query_start=columns[0],
        query_end=columns[1],
        key_start=columns[2],
        key_end=columns[2] + columns[1] - columns[0],
        prefix_start=columns[3],
        prefix_end=columns[4],
        positions_T=np.arange(row) + np.repeat(shifts, columns[1] - columns[0]),
        score_rows_C=np.array(score_rows, dtype=np.int64),
        num_keys=num_cached + row,
    )


def plan_passes(
    requests: Sequence[TokenizedRequest], cached: Sequence[bool], *, max_tokens_per_pass: int
) -> list[list[PassPart]]:
    """Group requests into passes of at most ``max_tokens_per_pass`` computed tokens.

    Requests keep their order. One that does not fit in what is left of a pass goes on in the next
    one, cut between candidates, with the keys and values of its prefix kept. A pass always holds
    at least one candidate, so that a prompt longer than the bound still runs, by itself.

    Args:
        cached: for each request, whether its prefix is known before the first pass.
    """
    passes: list[list[PassPart]] = [[]]
    room = max_tokens_per_pass
    for index, request in enumerate(requests):
        ends = list(accumulate((len(ids) for ids in request.segment_ids), initial=0))
        first, known = 0, cached[index]
        while first < len(request.segment_ids):
            prefix = 0 if known else len(request.prefix_ids)
            fitting = int(np.searchsorted(ends, ends[first] + room - prefix, side="right")) - 1
            # A cut costs another look at the prefix: start afresh rather than split what would
            # fit whole into an empty pass.
            whole = prefix + ends[-1] - ends[first] <= max_tokens_per_pass
            if passes[-1] and (fitting <= first or (whole and fitting < len(ends) - 1)):
                passes.append([])
                room = max_tokens_per_pass
                continue
            last = max(first + 1, min(fitting, len(ends) - 1))
            passes[-1].append(PassPart(request=index, first=first, last=last, cached=known))
            room -= prefix + ends[last] - ends[first]
            first, known = last, True
    return [parts for parts in passes if parts]
