"""Where every token of a pass stands: spans, positions and score rows.

A pass is a row of T tokens: for each request its prefix (unless its keys and values are cached)
and then its segments. The keys and values of cached prefixes stand in front, so that key row
``S - T + t`` belongs to token ``t``.

    keys     [cached prefix of request 2][prefix 1][segment][segment][segment 2][segment 2]
    tokens                               [prefix 1][segment][segment][segment 2][segment 2]

A prefix is a span that sees nothing before itself; a segment is a span that also sees its prefix.
Positions of a segment go on from the end of its prefix, whatever stands between them in the row.

Of some prefixes only the beginning is known. Its rest is a span that sees that beginning, and the
segments see both: such a pass has another front, in which the whole prefix stands together.

    known    [beginning of prefix 1][cached prefix of request 2]
    front    [beginning of prefix 1][its rest, again][cached prefix of request 2]
    tokens   [rest of prefix 1][segment][segment][segment 2]
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
        cache_salt: requests of different salts never share what is kept of a prefix.
    """

    prefix_ids: tuple[int, ...]
    segment_ids: tuple[tuple[int, ...], ...]
    label_ids: tuple[tuple[int, ...], ...]
    adapter: str | None = None
    cache_salt: str | None = None

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
        known: of a prefix that is not cached whole, the first tokens whose keys and values are.
    """

    request: int
    first: int
    last: int
    cached: bool
    known: int = 0

    def known_of(self, prefix_length: int) -> int:
        """Count the prefix tokens that do not go through the model."""
        return prefix_length if self.cached else self.known


@dataclass(frozen=True, kw_only=True)
class SegmentLayout:
    """Spans of one pass as arrays over its N spans, half-open token and key ranges.

    Attributes:
        query_start, query_end: a span's tokens, in 0..T.
        key_start, key_end: key rows of the span's tokens.
        prefix_start, prefix_end: key rows of the prefix it sees; empty for a prefix itself.
        positions_T: position of every token in its own prompt.
        score_rows_C: the last token of every segment, in the order of the parts.
        num_keys: S, the key rows in front and one for every token.
        num_cached: rows of the known keys and values that the pass is given.
        front_rows_F: where prefixes are known in part, the rows in front as rows of the known ones
            and the tokens together; empty where the known rows are the front.
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
    num_cached: int
    front_rows_F: NDArray[np.int64]

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
    front_rows: int = 0,
) -> SegmentLayout:
    """Place the parts of a pass one after another.

    Args:
        parts: what goes into the pass, in this order.
        prefix_lengths: tokens of each part's prefix.
        segment_lengths: tokens of each part's segments.
        cached_rows: rows reserved for known keys and values, if more than they need.
        front_rows: the same for the front of a pass whose prefixes are known in part.
    """
    known_lengths = [p.known_of(n) for p, n in zip(parts, prefix_lengths, strict=True)]
    num_cached = max(sum(known_lengths), cached_rows)
    is_partial = any(part.known > 0 and not part.cached for part in parts)
    num_front = max(count_front_rows(parts, prefix_lengths), front_rows)
    num_front = num_front if is_partial else num_cached
    spans: list[tuple[int, int, int, int, int]] = []
    first_positions: list[int] = []
    score_rows: list[int] = []
    front: list[NDArray[np.int64]] = []
    row, cached_row, front_row = 0, 0, 0
    for known, prefix_length, lengths in zip(
        known_lengths, prefix_lengths, segment_lengths, strict=True
    ):
        rest = prefix_length - known
        prefix_start = front_row if known else num_front + row
        if rest:
            seen = (prefix_start, prefix_start + known) if known else (0, 0)
            spans.append((row, row + rest, num_front + row, *seen))
            first_positions.append(known)
        if known:
            front.append(np.arange(cached_row, cached_row + known))
            front.append(np.arange(num_cached + row, num_cached + row + rest))
            cached_row += known
            front_row += prefix_length
        row += rest
        for length in lengths:
            spans.append(
                (row, row + length, num_front + row, prefix_start, prefix_start + prefix_length)
            )
            first_positions.append(prefix_length)
            row += length
            score_rows.append(row - 1)
    columns = np.array(spans, dtype=np.int64).reshape(-1, 5).T
    shifts = np.array(first_positions, dtype=np.int64) - columns[0]
    front_rows_F = np.zeros(num_front if is_partial else 0, dtype=np.int64)
    if is_partial:
        front_rows_F[:front_row] = np.concatenate(front)
    return SegmentLayout(
        query_start=columns[0],
        query_end=columns[1],
        key_start=columns[2],
        key_end=columns[2] + columns[1] - columns[0],
        prefix_start=columns[3],
        prefix_end=columns[4],
        positions_T=np.arange(row) + np.repeat(shifts, columns[1] - columns[0]),
        score_rows_C=np.array(score_rows, dtype=np.int64),
        num_keys=num_front + row,
        num_cached=num_cached,
        front_rows_F=front_rows_F,
    )


def count_front_rows(parts: Sequence[PassPart], prefix_lengths: Sequence[int]) -> int:
    """Count the rows in front of a pass: its whole prefixes, of those that are partly known."""
    pairs = zip(parts, prefix_lengths, strict=True)
    return sum(length for part, length in pairs if part.known_of(length))


def plan_passes(
    requests: Sequence[TokenizedRequest], known: Sequence[int], *, max_tokens_per_pass: int
) -> list[list[PassPart]]:
    """Group requests into passes of at most ``max_tokens_per_pass`` computed tokens.

    Requests keep their order. One that does not fit in what is left of a pass goes on in the next
    one, cut between candidates, with the keys and values of its prefix kept. A pass always holds
    at least one candidate, so that a prompt longer than the bound still runs, by itself.

    Args:
        known: for each request, the tokens of its prefix that are known before the first pass.
    """
    passes: list[list[PassPart]] = [[]]
    room = max_tokens_per_pass
    for index, request in enumerate(requests):
        ends = list(accumulate((len(ids) for ids in request.segment_ids), initial=0))
        first, found = 0, known[index]
        while first < len(request.segment_ids):
            prefix = len(request.prefix_ids) - found
            fitting = int(np.searchsorted(ends, ends[first] + room - prefix, side="right")) - 1
            # A cut costs another look at the prefix: start afresh rather than split what would
            # fit whole into an empty pass.
            whole = prefix + ends[-1] - ends[first] <= max_tokens_per_pass
            if passes[-1] and (fitting <= first or (whole and fitting < len(ends) - 1)):
                passes.append([])
                room = max_tokens_per_pass
                continue
            last = max(first + 1, min(fitting, len(ends) - 1))
            passes[-1].append(
                PassPart(
                    request=index,
                    first=first,
                    last=last,
                    cached=not prefix,
                    known=found if prefix else 0,
                )
            )
            room -= prefix + ends[last] - ends[first]
            first, found = last, len(request.prefix_ids)
    return [parts for parts in passes if parts]
