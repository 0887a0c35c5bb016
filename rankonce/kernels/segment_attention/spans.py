"""The ranges that say who sees whom."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentSpans:
    """Half-open ranges of the N spans of a pass, int32 tensors of N entries on one device.

    A token at ``query_start + j`` sees the key rows ``prefix_start .. prefix_end`` and
    ``key_start .. key_start + j``.

    Attributes:
        query_start, query_end: a span's tokens.
        key_start: key row of its first token.
        prefix_start, prefix_end: key rows of the prefix that it sees; equal where there is none.
    """

    query_start: Tensor
    query_end: Tensor
    key_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor

    def rows(self) -> list[tuple[int, int, int, int, int]]:
        """Return the spans as tuples of the five numbers, on the host."""
        columns = (
            self.query_start,
            self.query_end,
            self.key_start,
            self.prefix_start,
            self.prefix_end,
        )
        return list(zip(*(column.tolist() for column in columns), strict=True))
