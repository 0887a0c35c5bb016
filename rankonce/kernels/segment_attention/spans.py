"""The ranges that say who sees whom."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankonce.errors import ShapeError

COLUMNS = ("query_start", "query_end", "key_start", "key_end", "prefix_start", "prefix_end")


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentSpans:
    """Half-open ranges of the N spans of a pass, int32 arrays of N entries in host memory.

    A span's queries are the last tokens of its keys: the query ``query_end - 1 - j`` sees the key
    rows ``prefix_start .. prefix_end`` and ``key_start .. key_end - j``. With as many queries as
    keys this is causal attention behind a prefix; with one query it is the span's last token.

    Attributes:
        query_start, query_end: a span's queries; the spans cover 0..T in order.
        key_start, key_end: key rows of the span itself.
        prefix_start, prefix_end: key rows of the prefix that it sees; equal where there is none.
        tables: what a kernel made of the spans, on its device; see ``tiles``.
    """

    query_start: NDArray[np.int32]
    query_end: NDArray[np.int32]
    key_start: NDArray[np.int32]
    key_end: NDArray[np.int32]
    prefix_start: NDArray[np.int32]
    prefix_end: NDArray[np.int32]
    tables: dict[object, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "SegmentSpans":
        """Build spans from six numbers each, in the order of the attributes.

        Raises:
            ShapeError: the ranges are not in order or leave queries out.
        """
        columns = np.asarray(rows, dtype=np.int32).reshape(-1, 6).T
        query_start, query_end, key_start, key_end, prefix_start, prefix_end = columns
        spans = cls(
            query_start=query_start,
            query_end=query_end,
            key_start=key_start,
            key_end=key_end,
            prefix_start=prefix_start,
            prefix_end=prefix_end,
        )
        spans.check()
        return spans

    def check(self) -> None:
        """Refuse ranges that make no sense.

        Raises:
            ShapeError: names the range.
        """
        starts = np.concatenate(([0], self.query_end))[:-1]
        if (self.query_start != starts).any() or (self.query_end <= self.query_start).any():
            raise ShapeError("query_start, query_end: should cover 0..T in order, none empty")
        queries, keys = self.query_end - self.query_start, self.key_end - self.key_start
        if (keys < queries).any() or (self.key_start < 0).any():
            raise ShapeError("key_start, key_end: should hold a key for every query of the span")
        if (self.prefix_end < self.prefix_start).any() or (self.prefix_start < 0).any():
            raise ShapeError("prefix_start, prefix_end: should be a range of key rows")
        has_prefix = self.prefix_end > self.prefix_start
        if (has_prefix & (self.prefix_end > self.key_start)).any():
            raise ShapeError("prefix_end: should be at most the span's key_start")

    @property
    def num_queries(self) -> int:
        """T, the rows that attend."""
        return int(self.query_end[-1]) if len(self.query_end) else 0

    @cached_property
    def num_keys(self) -> int:
        """Key rows up to the last one that is seen."""
        return int(max(self.key_end.max(initial=0), self.prefix_end.max(initial=0)))

    def rows(self) -> list[tuple[int, ...]]:
        """Return the spans as tuples of the six numbers."""
        columns = (getattr(self, name).tolist() for name in COLUMNS)
        return list(zip(*columns, strict=True))

    def seen_ranges(self, window: int | None = None) -> NDArray[np.int32]:
        """Return for every query the two key ranges that it sees.

        Args:
            window: a query sees this many last tokens of its own prompt, itself included.

        Returns:
            int32, T x 4: start and end in the prefix, start and end in the span itself.
        """
        lengths = self.query_end - self.query_start
        span = np.repeat(np.arange(len(lengths)), lengths)
        query = np.arange(self.num_queries)
        own_start = self.key_start[span]
        own_end = self.key_end[span] - (self.query_end[span] - 1 - query)
        empty = self.prefix_start == self.prefix_end
        prefix_start = np.where(empty, 0, self.prefix_start)[span]
        prefix_end = np.where(empty, 0, self.prefix_end)[span]
        if window is not None:
            in_prefix = np.maximum(window - (own_end - own_start), 0)
            own_start = np.maximum(own_start, own_end - window)
            prefix_start = np.maximum(prefix_start, prefix_end - in_prefix)
        columns = (prefix_start, prefix_end, own_start, own_end)
        return np.stack(columns, axis=1).astype(np.int32)

    def padded(self, num_queries: int) -> "SegmentSpans":
        """Add queries up to a number; only kernels whose tables leave them out may see these."""
        # Spans of one token, so that no window comes to matter for them.
        extra = np.arange(self.num_queries, num_queries)
        zeros = np.zeros_like(extra)
        columns = (extra, extra + 1, zeros, zeros + 1, zeros, zeros)
        joined = {
            name: np.concatenate((getattr(self, name), more)).astype(np.int32)
            for name, more in zip(COLUMNS, columns, strict=True)
        }
        return replace(self, **joined, tables={})

    def shortened(self, window: int | None) -> bool:
        """Whether a window hides anything that a query would see without it."""
        if window is None:
            return False
        longest = self.prefix_end - self.prefix_start + self.key_end - self.key_start
        return bool(longest.max(initial=0) > window)


def last_queries(spans: SegmentSpans, last_rows: Tensor | NDArray[np.int64]) -> SegmentSpans:
    """Keep only the last query of some spans, in their order.

    Args:
        last_rows: the query rows to keep; each must be the last of its span.
    """
    rows = last_rows.numpy() if isinstance(last_rows, torch.Tensor) else last_rows
    kept = np.searchsorted(spans.query_end, rows + 1)
    if (spans.query_end[kept] != rows + 1).any():
        raise ShapeError("last_rows: should be the last queries of spans")
    number = np.arange(len(kept), dtype=np.int32)
    return SegmentSpans(
        query_start=number,
        query_end=number + 1,
        key_start=spans.key_start[kept],
        key_end=spans.key_end[kept],
        prefix_start=spans.prefix_start[kept],
        prefix_end=spans.prefix_end[kept],
    )
