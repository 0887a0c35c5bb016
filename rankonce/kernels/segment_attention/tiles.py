"""What the Triton kernels make of the spans: which keys a tile of queries reads, and the reverse.

A tile is a run of queries that see the same prefix, however many candidates they belong to. Its
keys fall into two kinds:

    full   blocks that every query of the tile sees whole: no mask, tensor cores only
    edge   everything else that some query sees, gathered from up to four ranges into shared
           blocks and masked query by query: what is left of the prefix, and the candidates

Each tile has its own bounds, so a long candidate costs its own tile and nobody else's. All tables
are int32 and are built on the host, once a pass.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankonce.kernels.segment_attention.spans import SegmentSpans

# Keys of the candidates themselves that a tile of score rows reads at most, if it has several rows:
# each sees only its own, and without a bound the last layer would wait for a few long tiles.
_MAX_OWN_KEYS = 2048
# Numbers of a query tile: its queries, two runs of full blocks, four edge ranges, and two unused.
TILE_FIELDS = 16


@dataclass(frozen=True, kw_only=True)
class TileKey:
    """What a table depends on beside the spans.

    Attributes:
        queries: tokens of a query tile, over all heads of a group.
        keys: keys of a full block.
        window: of a sliding-window layer.
    """

    queries: int
    keys: int
    window: int | None = None


def query_tables(spans: SegmentSpans, key: TileKey) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut the queries into tiles, the ones with most keys first.

    Returns:
        seen_T4: the two key ranges of every query.
        tiles_NF: for each tile ``query_start, query_end``; start and number of blocks of the full
            blocks in the prefix and in the span; start and length of the four edge ranges.
    """
    seen_T4 = spans.seen_ranges(key.window)
    starts, ends = _runs(spans, _tile_queries(spans, key.queries))
    prefix_lo, own_lo = seen_T4[:, 0], seen_T4[:, 2]
    own_hi = seen_T4[:, 3]
    first, last = _extremes(prefix_lo, starts)
    prefix_end = seen_T4[starts, 1]
    num_prefix = np.maximum(prefix_end - last, 0) // key.keys
    prefix_tail = last + num_prefix * key.keys
    own_first, own_last = _extremes(own_lo, starts)
    end_first, end_last = _extremes(own_hi, starts)
    # Keys of the span that all queries see: none where the tile holds several candidates.
    num_own = np.maximum(end_first - own_last, 0) // key.keys
    shared = end_first > own_last
    edge_end = np.where(shared, own_last, end_last)
    own_tail = np.where(shared, own_last + num_own * key.keys, end_last)
    tiles = np.zeros((len(starts), TILE_FIELDS), dtype=np.int32)
    columns = (
        starts,
        ends,
        last,
        num_prefix,
        own_last,
        num_own,
        first,
        np.minimum(last, prefix_end) - first,
        prefix_tail,
        prefix_end - prefix_tail,
        own_first,
        edge_end - own_first,
        own_tail,
        end_last - own_tail,
    )
    for place, column in enumerate(columns):
        tiles[:, place] = column
    cost = (num_prefix + num_own) * key.keys + tiles[:, 7:15:2].sum(axis=1)
    return seen_T4, tiles[np.argsort(-cost, kind="stable")]


def _tile_queries(spans: SegmentSpans, queries: int) -> int:
    """Return how many queries go into a tile: fewer where each stands for a whole candidate."""
    lengths = spans.key_end - spans.key_start
    if (lengths == spans.query_end - spans.query_start).all():
        return queries
    return int(np.clip(_MAX_OWN_KEYS // lengths.max(), 1, queries))


def _runs(spans: SegmentSpans, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut runs of queries with one prefix into pieces of at most ``size``."""
    changes = (np.diff(spans.prefix_start) != 0) | (np.diff(spans.prefix_end) != 0)
    # Spans without a prefix may share a tile wherever their empty range stands.
    empty = spans.prefix_start == spans.prefix_end
    changes &= ~(empty[1:] & empty[:-1])
    firsts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    run_starts = spans.query_start[firsts].astype(np.int64)
    run_ends = np.concatenate((run_starts[1:], [spans.num_queries]))
    counts = -(-(run_ends - run_starts) // size)
    run = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = run_starts[run] + place * size
    return starts, np.minimum(starts + size, run_ends[run])


def _extremes(
    values: NDArray[np.int32], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the smallest and the largest value of each run; the runs cover all values."""
    return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def key_tables(
    spans: SegmentSpans, *, keys: int, num_keys: int, window: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """List for every block of keys the runs of queries that see some of it.

    Returns:
        tiles_N4: ``key_start, key_end, first run, end of runs``, those with most queries first.
        runs_M4: ``query_start, query_end, whether every query sees every key``, and one unused.
    """
    seen_T4 = spans.seen_ranges(window)
    # Runs of queries with one prefix, and every span by itself.
    starts, ends = _runs(spans, spans.num_queries)
    low, high = _extremes(seen_T4[:, 0], starts)
    prefix_end = seen_T4[starts, 1]
    tiles: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    for key_start in range(0, num_keys, keys):
        key_end = min(key_start + keys, num_keys)
        first_run = len(runs)
        in_prefix = (low < key_end) & (prefix_end > key_start)
        whole = in_prefix & (high <= key_start) & (key_end <= prefix_end)
        runs += [(int(starts[run]), int(ends[run]), 1, 0) for run in np.flatnonzero(whole)]
        # A block may hold the end of a prefix and tokens of its candidates: no query comes twice.
        partly = [(int(starts[run]), int(ends[run])) for run in np.flatnonzero(in_prefix & ~whole)]
        partly += _own_runs(spans, key_start, key_end, window)
        runs += [(start, end, 0, 0) for start, end in _merged(partly)]
        tiles.append((key_start, key_end, first_run, len(runs)))
    tiles_N4 = np.asarray(tiles, dtype=np.int32).reshape(-1, 4)
    runs_M4 = np.asarray(runs, dtype=np.int32).reshape(-1, 4)
    sizes = np.concatenate(([0], np.cumsum(runs_M4[:, 1] - runs_M4[:, 0])))
    cost = sizes[tiles_N4[:, 3]] - sizes[tiles_N4[:, 2]]
    return tiles_N4[np.argsort(-cost, kind="stable")], runs_M4


def _own_runs(
    spans: SegmentSpans, key_start: int, key_end: int, window: int | None
) -> list[tuple[int, int]]:
    """Return the queries that see a block as part of their own span."""
    # A query sees keys up to its own, so those before the block's first key are left out.
    offset = spans.query_end - spans.key_end
    starts = np.maximum(spans.query_start, key_start + offset)
    ends = spans.query_end
    if window is not None:
        ends = np.minimum(ends, key_end - 1 + offset + window)
    seen = (spans.key_start < key_end) & (spans.key_end > key_start) & (starts < ends)
    return list(zip(starts[seen].tolist(), ends[seen].tolist(), strict=True))


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join runs that meet or overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if merged and start <= merged[-1][1]:
            first, last = merged.pop()
            start, end = first, max(last, end)
        merged.append((start, end))
    return merged
