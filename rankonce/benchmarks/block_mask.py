"""The visibility of a pass in the forms that other implementations take."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rankonce.layout import SegmentLayout

BLOCK = 128


def seen_ranges(layout: SegmentLayout) -> NDArray[np.int64]:
    """Return for every token the two key ranges that it sees, T x 4, half-open."""
    lengths = layout.query_end - layout.query_start
    span = np.repeat(np.arange(len(lengths)), lengths)
    own_end = layout.key_start[span] + np.arange(layout.num_tokens) - layout.query_start[span] + 1
    columns = (layout.prefix_start[span], layout.prefix_end[span], layout.key_start[span], own_end)
    return np.stack(columns, axis=1)


def dense_mask_of(layout: SegmentLayout, device: str) -> Tensor:
    """Write out who sees whom, T x S."""
    ranges_T4 = torch.from_numpy(seen_ranges(layout)).to(device)
    seen_TS = torch.empty((layout.num_tokens, layout.num_keys), dtype=torch.bool, device=device)
    keys = torch.arange(layout.num_keys, device=device)
    for start in range(0, layout.num_tokens, 4096):
        first, last, own, end = ranges_T4[start : start + 4096, :, None].unbind(1)
        seen = ((keys >= first) & (keys < last)) | ((keys >= own) & (keys < end))
        seen_TS[start : start + 4096] = seen
    return seen_TS


def block_kinds(layout: SegmentLayout, block: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell for every block of queries and of keys whether some pair is seen, and whether all are.

    Worked out span by span from where the ranges overlap a block, never token by token.
    """
    num_tokens, num_keys = layout.num_tokens, layout.num_keys
    edges = np.arange(0, num_tokens, block)
    # Pieces: spans cut at the borders of query blocks.
    starts = np.union1d(edges, layout.query_start)
    ends = np.append(starts[1:], num_tokens)
    span = np.searchsorted(layout.query_start, starts, side="right") - 1
    keys = np.arange(0, num_keys, block)
    key_ends = np.minimum(keys + block, num_keys)

    def overlap(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
        low = np.maximum(first[:, None], keys)
        shared: NDArray[np.int64] = np.minimum(last[:, None], key_ends) - low
        return shared.clip(min=0)

    own_start = layout.key_start[span]
    offset = own_start - layout.query_start[span]
    prefix = overlap(layout.prefix_start[span], layout.prefix_end[span])
    by_last = prefix + overlap(own_start, ends + offset)
    by_first = prefix + overlap(own_start, starts + offset + 1)
    firsts = np.searchsorted(starts, edges)
    some = np.logical_or.reduceat(by_last > 0, firsts)
    # A block that sticks out of the matrix is not full, as create_block_mask has it.
    every = np.logical_and.reduceat(by_first == block, firsts)
    every &= (edges + block <= num_tokens)[:, None]
    return some, every


def block_mask_of(layout: SegmentLayout, device: str, *, block: int = BLOCK) -> BlockMask:
    """Build FlexAttention's mask without looking at T x S pairs."""
    some, every = block_kinds(layout, block)
    ranges_T4 = torch.from_numpy(seen_ranges(layout).astype(np.int32)).to(device)
    first, last, own, end = (column.contiguous() for column in ranges_T4.unbind(1))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = (key >= first[query]) & (key < last[query])
        return in_prefix | ((key >= own[query]) & (key < end[query]))

    def listed(kinds: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        order = np.argsort(~kinds, axis=1, kind="stable").astype(np.int32)
        counts = kinds.sum(axis=1).astype(np.int32)
        return (
            torch.from_numpy(counts).to(device)[None, None],
            torch.from_numpy(order).to(device)[None, None],
        )

    partial, full = listed(some & ~every), listed(every)
    arguments: dict[str, Any] = {
        "kv_num_blocks": partial[0],
        "kv_indices": partial[1],
        "full_kv_num_blocks": full[0],
        "full_kv_indices": full[1],
        "BLOCK_SIZE": (block, block),
        "mask_mod": sees,
        "seq_lengths": (layout.num_tokens, layout.num_keys),
    }
    return BlockMask.from_kv_blocks(**arguments)
