"""Segment attention on a GPU: one online softmax over the prefix and the candidate itself.

A program takes one tile of queries for one key/value head. Its rows are the tile's tokens times
the query heads that share the key/value head, so that several short candidates and all heads of a
group fill one tensor-core tile. ``tiles`` says which keys a tile reads.

The online softmax is that of FlashAttention-2 (Dao 2023), whose backward pass this follows too:
one kernel over query tiles for dq, one over key blocks for dk and dv, no atomics, so that the
gradients have the same bits every time.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rankonce.kernels.segment_attention.spans import SegmentSpans
from rankonce.kernels.segment_attention.tiles import (
    TILE_FIELDS,
    TileKey,
    key_tables,
    query_tables,
)


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tile shape of a kernel.

    Attributes:
        rows: query rows of a tile (tokens times heads of a group).
        keys: keys of a full block.
        edge: keys of an edge block, gathered and masked.
        copy_engine: load full blocks by Hopper's tensor copies instead of by pointers.
    """

    rows: int
    keys: int
    edge: int
    num_warps: int
    num_stages: int
    copy_engine: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        loads = "copies" if self.copy_engine else "pointers"
        shape = f"{self.rows}x{self.keys}, edge {self.edge}"
        return f"{shape}, {self.num_warps} warps, {self.num_stages} stages, {loads}"


# FP32 products run on plain cores: small tiles on many threads keep accumulators in registers.
_FP32_TILE = TileConfig(rows=32, keys=32, edge=32, num_warps=8, num_stages=1)


def forward_config(head_size: int, dtype: torch.dtype, capability: int) -> TileConfig:
    """Choose the forward tile for a chip.

    Args:
        capability: 80, 90, 100, ... as CUDA counts.
    """
    if dtype == torch.float32:
        return _FP32_TILE
    if capability < 90:
        if head_size > 128:
            return TileConfig(rows=64, keys=32, edge=32, num_warps=8, num_stages=1)
        return TileConfig(rows=128, keys=64, edge=32, num_warps=8, num_stages=2)
    if head_size > 128:
        # A larger edge block would not fit in registers beside the accumulator.
        return TileConfig(rows=128, keys=64, edge=32, num_warps=8, num_stages=2, copy_engine=True)
    # 128 rows halve the traffic of keys and values from L2, which 64 rows are bound by; an edge of
    # 64 keys is one block for a candidate of 64 tokens; three stages fill the shared memory. With
    # heads of 64, blocks of 64 keys let two programs share a multiprocessor: one's softmax runs
    # beside the other's products.
    keys = 128 if head_size > 64 else 64
    return TileConfig(rows=128, keys=keys, edge=64, num_warps=8, num_stages=3, copy_engine=True)


def forward_choices(head_size: int) -> list[TileConfig]:
    """List the forward tiles for 16-bit numbers that are worth measuring on a Hopper chip."""
    shapes = [
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 2),
        (128, 64, 32, 8, 4),
        (64, 128, 64, 4, 2),
        (64, 64, 64, 4, 3),
    ]
    if head_size <= 64:
        shapes += [(128, 64, 64, 4, 3), (256, 64, 64, 8, 3)]
    return [
        TileConfig(
            rows=rows,
            keys=keys,
            edge=edge,
            num_warps=num_warps,
            num_stages=num_stages,
            copy_engine=copy_engine,
        )
        for rows, keys, edge, num_warps, num_stages in shapes
        for copy_engine in (True, False)
    ]


def backward_config(head_size: int, dtype: torch.dtype, capability: int) -> TileConfig:
    """Choose the backward tile for a chip; two more accumulators live in registers."""
    if dtype == torch.float32:
        return _FP32_TILE
    if head_size > 128:
        return TileConfig(rows=32, keys=32, edge=32, num_warps=4, num_stages=1)
    if capability < 90:
        return TileConfig(rows=32, keys=64, edge=64, num_warps=8, num_stages=2)
    return TileConfig(rows=64, keys=64, edge=64, num_warps=8, num_stages=2)


@triton.jit
def _rows_of_tile(tile_ptr, group, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Return token, head and validity of the tile's rows."""
    query_start = tl.load(tile_ptr)
    query_end = tl.load(tile_ptr + 1)
    row = tl.arange(0, ROWS)
    token = query_start + row // HEADS
    return token, group * HEADS + row % HEADS, token < query_end


@triton.jit
def _seen_of_rows(seen_ptr, token, valid):
    """Return the two key ranges of every row; nothing for empty rows."""
    seen_ptrs = seen_ptr + token.to(tl.int64) * 4
    prefix_start = tl.load(seen_ptrs, mask=valid, other=0)
    prefix_end = tl.load(seen_ptrs + 1, mask=valid, other=0)
    own_start = tl.load(seen_ptrs + 2, mask=valid, other=0)
    own_end = tl.load(seen_ptrs + 3, mask=valid, other=0)
    return prefix_start, prefix_end, own_start, own_end


@triton.jit
def _edge_bounds(tile_ptr):
    """Return the starts of the four edge ranges and their running lengths."""
    start0 = tl.load(tile_ptr + 6)
    end0 = tl.load(tile_ptr + 7)
    start1 = tl.load(tile_ptr + 8)
    end1 = end0 + tl.load(tile_ptr + 9)
    start2 = tl.load(tile_ptr + 10)
    end2 = end1 + tl.load(tile_ptr + 11)
    start3 = tl.load(tile_ptr + 12)
    end3 = end2 + tl.load(tile_ptr + 13)
    return start0, start1, start2, start3, end0, end1, end2, end3


@triton.jit
def _edge_keys(place, start0, start1, start2, start3, end0, end1, end2):
    """Return the key rows at places of the joined edge ranges."""
    key = tl.where(place < end2, start2 + place - end1, start3 + place - end2)
    key = tl.where(place < end1, start1 + place - end0, key)
    return tl.where(place < end0, start0 + place, key)


@triton.jit
def _full_key(index, prefix_start, num_prefix, own_start, KEYS: tl.constexpr):
    """Return the first key of a full block: those in the prefix come first."""
    in_prefix = prefix_start + index * KEYS
    in_span = own_start + (index - num_prefix) * KEYS
    return tl.where(index < num_prefix, in_prefix, in_span)


@triton.jit
def _load_rows(base_ptr, row, stride, inside, HEAD_SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr):
    """Load whole rows, zeros where there is none."""
    size = tl.arange(0, PADDED_SIZE)
    mask = inside[:, None] & (size < HEAD_SIZE)[None, :]
    ptrs = base_ptr + row.to(tl.int64)[:, None] * stride + size[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _seen(key, inside, prefix_start, prefix_end, own_start, own_end):
    """Return which row sees which key."""
    in_prefix = (key[None, :] >= prefix_start[:, None]) & (key[None, :] < prefix_end[:, None])
    in_span = (key[None, :] >= own_start[:, None]) & (key[None, :] < own_end[:, None])
    return (in_prefix | in_span) & inside[None, :]


@triton.jit
def _tanh(x):
    # The quotient loses what is small beside 1, the series what is large.
    x2 = x * x
    series = x * (1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _factor(scale, HAS_SOFTCAP: tl.constexpr):
    """Return what makes logits of ``_logits`` those of exp2: folded into the exponent's FMA."""
    if HAS_SOFTCAP:
        return 1.4426950408889634
    return scale * 1.4426950408889634


@triton.jit
def _logits(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return plain products, or capped logits."""
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:
        product = _tanh(product * (scale / softcap)) * softcap
    return product


@triton.jit
def _online_softmax(logits, factor, v, acc, largest, total):
    """Take up one block of keys; ``factor`` is above 0."""
    new_largest = tl.maximum(largest, tl.max(logits, 1) * factor)
    # A row that has seen no key yet keeps -inf, which must not meet itself.
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(logits * factor - reference[:, None])
    decay = tl.exp2(largest - reference)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_largest, total


@triton.jit
def forward_kernel(
    q_ptr,
    k_desc,
    v_desc,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    seen_ptr,
    tiles_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_LSE: tl.constexpr,
    COPY_ENGINE: tl.constexpr,
):
    # All heads of a tile run side by side: they end together, the longest tiles first.
    program = tl.program_id(0)
    group = program % GROUPS
    tile_ptr = tiles_ptr + (program // GROUPS).to(tl.int64) * TILE_FIELDS
    token, head, valid = _rows_of_tile(tile_ptr, group, HEADS, ROWS)
    size = tl.arange(0, PADDED_SIZE)
    row_offset = token.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    q_mask = valid[:, None] & (size < HEAD_SIZE)[None, :]
    q = tl.load(q_ptr + row_offset[:, None] + size[None, :], mask=q_mask, other=0.0)

    factor = _factor(scale, HAS_SOFTCAP)
    acc = tl.zeros([ROWS, PADDED_SIZE], dtype=tl.float32)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    full_prefix = tl.load(tile_ptr + 2)
    num_prefix = tl.load(tile_ptr + 3)
    full_own = tl.load(tile_ptr + 4)
    num_full = num_prefix + tl.load(tile_ptr + 5)
    k_base = k_ptr + group.to(tl.int64) * k_stride_g
    v_base = v_ptr + group.to(tl.int64) * v_stride_g
    every_key = tl.full([KEYS], True, dtype=tl.int1)
    for index in tl.range(0, num_full):
        first = _full_key(index, full_prefix, num_prefix, full_own, KEYS)
        key = first + tl.arange(0, KEYS)
        if COPY_ENGINE:
            k = k_desc.load([group, first, 0]).reshape(KEYS, PADDED_SIZE)
        else:
            k = _load_rows(k_base, key, k_stride_s, every_key, HEAD_SIZE, PADDED_SIZE)
        logits = _logits(q, k, scale, softcap, HAS_SOFTCAP)
        if COPY_ENGINE:
            v = v_desc.load([group, first, 0]).reshape(KEYS, PADDED_SIZE)
        else:
            v = _load_rows(v_base, key, v_stride_s, every_key, HEAD_SIZE, PADDED_SIZE)
        acc, largest, total = _online_softmax(logits, factor, v, acc, largest, total)

    prefix_start, prefix_end, own_start, own_end = _seen_of_rows(seen_ptr, token, valid)
    start0, start1, start2, start3, end0, end1, end2, end3 = _edge_bounds(tile_ptr)
    for first in tl.range(0, end3, EDGE):
        place = first + tl.arange(0, EDGE)
        inside = place < end3
        key = _edge_keys(place, start0, start1, start2, start3, end0, end1, end2)
        k = _load_rows(k_base, key, k_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
        logits = _logits(q, k, scale, softcap, HAS_SOFTCAP)
        v = _load_rows(v_base, key, v_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
        seen = _seen(key, inside, prefix_start, prefix_end, own_start, own_end)
        logits = tl.where(seen, logits, float("-inf"))
        acc, largest, total = _online_softmax(logits, factor, v, acc, largest, total)

    safe_total = tl.where(total > 0, total, 1.0)
    out = acc / safe_total[:, None]
    out_offset = token.to(tl.int64) * out_stride_t + head.to(tl.int64) * out_stride_h
    tl.store(
        out_ptr + out_offset[:, None] + size[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=q_mask,
    )
    if STORE_LSE:
        lse = largest + tl.log2(safe_total)
        tl.store(lse_ptr + token.to(tl.int64) * lse_stride_t + head, lse, mask=valid)


@triton.jit
def _logit_gradients(weights, dweights, delta, capped, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the gradients of the logits before softcap."""
    grads = weights * (dweights - delta)
    if HAS_SOFTCAP:
        # Unseen logits are -inf, and their gradient must stay 0.
        ratio = tl.where(weights > 0, capped, 0.0) / softcap
        grads = grads * (1 - ratio * ratio)
    return grads


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    seen_ptr,
    tiles_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    dout_stride_t,
    dout_stride_h,
    dq_stride_t,
    dq_stride_h,
    lse_stride_t,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % GROUPS
    tile_ptr = tiles_ptr + (program // GROUPS).to(tl.int64) * TILE_FIELDS
    token, head, valid = _rows_of_tile(tile_ptr, group, HEADS, ROWS)
    size = tl.arange(0, PADDED_SIZE)
    token64, head64 = token.to(tl.int64), head.to(tl.int64)
    mask = valid[:, None] & (size < HEAD_SIZE)[None, :]
    q_offset = token64 * q_stride_t + head64 * q_stride_h
    q = tl.load(q_ptr + q_offset[:, None] + size[None, :], mask=mask, other=0.0)
    dout_offset = token64 * dout_stride_t + head64 * dout_stride_h
    dout = tl.load(dout_ptr + dout_offset[:, None] + size[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + token64 * lse_stride_t + head, mask=valid, other=0.0)
    delta = tl.load(delta_ptr + token64 * lse_stride_t + head, mask=valid, other=0.0)
    factor = _factor(scale, HAS_SOFTCAP)
    dq = tl.zeros([ROWS, PADDED_SIZE], dtype=tl.float32)
    k_base = k_ptr + group.to(tl.int64) * k_stride_g
    v_base = v_ptr + group.to(tl.int64) * v_stride_g

    full_prefix = tl.load(tile_ptr + 2)
    num_prefix = tl.load(tile_ptr + 3)
    full_own = tl.load(tile_ptr + 4)
    num_full = num_prefix + tl.load(tile_ptr + 5)
    every_key = tl.full([KEYS], True, dtype=tl.int1)
    for index in tl.range(0, num_full):
        key = _full_key(index, full_prefix, num_prefix, full_own, KEYS) + tl.arange(0, KEYS)
        k = _load_rows(k_base, key, k_stride_s, every_key, HEAD_SIZE, PADDED_SIZE)
        v = _load_rows(v_base, key, v_stride_s, every_key, HEAD_SIZE, PADDED_SIZE)
        logits = _logits(q, k, scale, softcap, HAS_SOFTCAP)
        weights = tl.exp2(logits * factor - lse[:, None])
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        grads = _logit_gradients(weights, dweights, delta[:, None], logits, softcap, HAS_SOFTCAP)
        dq = tl.dot(grads.to(k.dtype), k, dq, input_precision="ieee")

    prefix_start, prefix_end, own_start, own_end = _seen_of_rows(seen_ptr, token, valid)
    start0, start1, start2, start3, end0, end1, end2, end3 = _edge_bounds(tile_ptr)
    for first in tl.range(0, end3, EDGE):
        place = first + tl.arange(0, EDGE)
        inside = place < end3
        key = _edge_keys(place, start0, start1, start2, start3, end0, end1, end2)
        k = _load_rows(k_base, key, k_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
        v = _load_rows(v_base, key, v_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
        logits = _logits(q, k, scale, softcap, HAS_SOFTCAP)
        seen = _seen(key, inside, prefix_start, prefix_end, own_start, own_end)
        logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(logits * factor - lse[:, None])
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        grads = _logit_gradients(weights, dweights, delta[:, None], logits, softcap, HAS_SOFTCAP)
        dq = tl.dot(grads.to(k.dtype), k, dq, input_precision="ieee")

    dq_offset = token64 * dq_stride_t + head64 * dq_stride_h
    tl.store(
        dq_ptr + dq_offset[:, None] + size[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    seen_ptr,
    tiles_ptr,
    runs_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    dout_stride_t,
    dout_stride_h,
    dk_stride_s,
    dk_stride_g,
    lse_stride_t,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % GROUPS
    tile_ptr = tiles_ptr + (program // GROUPS).to(tl.int64) * 4
    key_start = tl.load(tile_ptr)
    key_end = tl.load(tile_ptr + 1)
    first_run = tl.load(tile_ptr + 2)
    end_of_runs = tl.load(tile_ptr + 3)
    size = tl.arange(0, PADDED_SIZE)
    key = key_start + tl.arange(0, KEYS)
    key64 = key.to(tl.int64)
    inside = key < key_end
    k_base = k_ptr + group.to(tl.int64) * k_stride_g
    k = _load_rows(k_base, key, k_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
    v_base = v_ptr + group.to(tl.int64) * v_stride_g
    v = _load_rows(v_base, key, v_stride_s, inside, HEAD_SIZE, PADDED_SIZE)
    factor = _factor(scale, HAS_SOFTCAP)
    dk = tl.zeros([KEYS, PADDED_SIZE], dtype=tl.float32)
    dv = tl.zeros([KEYS, PADDED_SIZE], dtype=tl.float32)
    row = tl.arange(0, ROWS)
    # Rows are tokens times heads, in tiles that need not end with a token.
    for run in range(first_run, end_of_runs):
        run_ptr = runs_ptr + run * 4
        query_start = tl.load(run_ptr)
        num_rows = (tl.load(run_ptr + 1) - query_start) * HEADS
        whole = tl.load(run_ptr + 2) != 0
        for first in tl.range(0, num_rows, ROWS):
            valid = first + row < num_rows
            token = query_start + (first + row) // HEADS
            head = group * HEADS + (first + row) % HEADS
            token64, head64 = token.to(tl.int64), head.to(tl.int64)
            mask = valid[:, None] & (size < HEAD_SIZE)[None, :]
            q_offset = token64 * q_stride_t + head64 * q_stride_h
            q = tl.load(q_ptr + q_offset[:, None] + size[None, :], mask=mask, other=0.0)
            dout_offset = token64 * dout_stride_t + head64 * dout_stride_h
            dout = tl.load(dout_ptr + dout_offset[:, None] + size[None, :], mask=mask, other=0.0)
            lse = tl.load(lse_ptr + token64 * lse_stride_t + head, mask=valid, other=0.0)
            delta = tl.load(delta_ptr + token64 * lse_stride_t + head, mask=valid, other=0.0)
            logits = _logits(q, k, scale, softcap, HAS_SOFTCAP)
            prefix_start, prefix_end, own_start, own_end = _seen_of_rows(seen_ptr, token, valid)
            seen = _seen(key, inside, prefix_start, prefix_end, own_start, own_end)
            # Empty rows of a run that sees the whole block must not count.
            seen = (seen | (whole & inside[None, :])) & valid[:, None]
            logits = tl.where(seen, logits, float("-inf"))
            weights = tl.exp2(logits * factor - lse[:, None])
            dv = tl.dot(tl.trans(weights.to(dout.dtype)), dout, dv, input_precision="ieee")
            dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
            grads = _logit_gradients(
                weights, dweights, delta[:, None], logits, softcap, HAS_SOFTCAP
            )
            dk = tl.dot(tl.trans(grads.to(q.dtype)), q, dk, input_precision="ieee")
    key_mask = inside[:, None] & (size < HEAD_SIZE)[None, :]
    out_offset = key64 * dk_stride_s + group.to(tl.int64) * dk_stride_g
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + out_offset[:, None] + size[None, :], dk, mask=key_mask)
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + out_offset[:, None] + size[None, :], dv, mask=key_mask)


def segment_attention_triton(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    spans: SegmentSpans,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Compute segment attention with gradients; arguments as in ``segment_attention``.

    Args:
        config: the forward tile, without gradients; by default the one of ``forward_config``.
    """
    window = window if spans.shortened(window) else None
    q_THK, k_SGK, v_SGK = (_aligned(tensor) for tensor in (q_THK, k_SGK, v_SGK))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_THK, k_SGK, v_SGK)):
        out: Tensor = _SegmentAttention.apply(q_THK, k_SGK, v_SGK, spans, scale, softcap, window)  # type: ignore[no-untyped-call]
        return out
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q_THK):
        return _forward(
            q_THK, k_SGK, v_SGK, spans, scale, softcap, window, store_lse=False, config=config
        )[0]


def forward_tables(
    spans: SegmentSpans, key: TileKey, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``query_tables`` on the device, building and moving them if nobody did."""
    found = spans.tables.get(key)
    if found is None or found[0].device != device:
        found = spans.tables[key] = _moved(query_tables(spans, key), device)
    seen_T4, tiles_NF = found
    return seen_T4, tiles_NF


def tile_key(num_heads: int, num_groups: int, config: TileConfig, window: int | None) -> TileKey:
    """Return what the query tables depend on."""
    return TileKey(
        queries=config.rows // (num_heads // num_groups), keys=config.keys, window=window
    )


def _holding(config: TileConfig, num_heads: int, num_groups: int) -> TileConfig:
    """Return a tile that holds all heads of a group for at least one token."""
    return replace(config, rows=max(config.rows, triton.next_power_of_2(num_heads // num_groups)))


def _forward(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    spans: SegmentSpans,
    scale: float,
    softcap: float | None,
    window: int | None,
    *,
    store_lse: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_size = q_THK.shape
    num_groups = k_SGK.shape[1]
    config = config or forward_config(head_size, q_THK.dtype, _capability(q_THK.device))
    config = _holding(config, num_heads, num_groups)
    padded = max(16, triton.next_power_of_2(head_size))
    key = tile_key(num_heads, num_groups, config, window)
    seen_T4, tiles_NF = forward_tables(spans, key, q_THK.device)
    out_THK = torch.empty(
        (num_tokens, num_heads, head_size), dtype=q_THK.dtype, device=q_THK.device
    )
    lse_TH = torch.empty(
        (num_tokens, num_heads) if store_lse else (0, 0), dtype=torch.float32, device=q_THK.device
    )
    # Group first: a leading dimension of 1 falls away when a block is loaded.
    block = [1, config.keys, padded]
    k_block, v_block = (
        TensorDescriptor.from_tensor(tensor.transpose(0, 1), block) if config.copy_engine else None
        for tensor in (k_SGK, v_SGK)
    )
    forward_kernel[(len(tiles_NF) * num_groups,)](
        q_THK,
        k_block,
        v_block,
        k_SGK,
        v_SGK,
        out_THK,
        lse_TH,
        seen_T4,
        tiles_NF,
        *q_THK.stride()[:2],
        *k_SGK.stride()[:2],
        *v_SGK.stride()[:2],
        *out_THK.stride()[:2],
        num_heads,
        scale,
        softcap or 0.0,
        GROUPS=num_groups,
        HEADS=num_heads // num_groups,
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded,
        ROWS=config.rows,
        KEYS=config.keys,
        EDGE=config.edge,
        TILE_FIELDS=TILE_FIELDS,
        HAS_SOFTCAP=softcap is not None,
        STORE_LSE=store_lse,
        COPY_ENGINE=config.copy_engine,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out_THK, lse_TH


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_SGK: Tensor,
        v_SGK: Tensor,
        spans: SegmentSpans,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        with torch.cuda.device_of(q_THK):
            out_THK, lse_TH = _forward(
                q_THK, k_SGK, v_SGK, spans, scale, softcap, window, store_lse=True
            )
        ctx.save_for_backward(q_THK, k_SGK, v_SGK, out_THK, lse_TH)
        ctx.options = (spans, scale, softcap, window)
        return out_THK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(grads[0]):
            dq, dk, dv = _backward(grads[0], *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None, None, None


def _backward(
    dout_THK: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    out_THK: Tensor,
    lse_TH: Tensor,
    spans: SegmentSpans,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_heads, head_size = q_THK.shape
    num_keys, num_groups, _ = k_SGK.shape
    dout_THK = _aligned(dout_THK)
    config = backward_config(head_size, q_THK.dtype, _capability(q_THK.device))
    config = _holding(config, num_heads, num_groups)
    delta_TH = (dout_THK.float() * out_THK.float()).sum(dim=-1)
    dq_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
    dk_SGK, dv_SGK = (
        torch.empty((num_keys, num_groups, head_size), dtype=k_SGK.dtype, device=k_SGK.device)
        for _ in range(2)
    )
    key = tile_key(num_heads, num_groups, config, window)
    seen_T4, tiles_NF = forward_tables(spans, key, q_THK.device)
    key_tiles_N4, runs_M4 = _backward_tables(spans, config.keys, num_keys, window, q_THK.device)
    inputs = (q_THK, k_SGK, v_SGK, dout_THK, lse_TH, delta_TH)
    strides = (
        *q_THK.stride()[:2],
        *k_SGK.stride()[:2],
        *v_SGK.stride()[:2],
        *dout_THK.stride()[:2],
    )
    shape = {
        "GROUPS": num_groups,
        "HEADS": num_heads // num_groups,
        "HEAD_SIZE": head_size,
        "PADDED_SIZE": max(16, triton.next_power_of_2(head_size)),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "HAS_SOFTCAP": softcap is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    query_gradient_kernel[(len(tiles_NF) * num_groups,)](
        *inputs,
        dq_THK,
        seen_T4,
        tiles_NF,
        *strides,
        *dq_THK.stride()[:2],
        num_heads,
        scale,
        softcap or 0.0,
        EDGE=config.edge,
        TILE_FIELDS=TILE_FIELDS,
        **shape,
    )
    key_gradient_kernel[(len(key_tiles_N4) * num_groups,)](
        *inputs,
        dk_SGK,
        dv_SGK,
        seen_T4,
        key_tiles_N4,
        runs_M4,
        *strides,
        *dk_SGK.stride()[:2],
        num_heads,
        scale,
        softcap or 0.0,
        **shape,
    )
    return dq_THK, dk_SGK, dv_SGK


def _backward_tables(
    spans: SegmentSpans, keys: int, num_keys: int, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    key = ("key gradients", keys, num_keys, window)
    found = spans.tables.get(key)
    if found is None or found[0].device != device:
        tables = key_tables(spans, keys=keys, num_keys=num_keys, window=window)
        found = spans.tables[key] = _moved(tables, device)
    tiles_N4, runs_M4 = found
    return tiles_N4, runs_M4


def _moved(tables: tuple[NDArray[np.int32], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Move tables in one copy."""
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables])).to(device)
    parts = flat.split([table.size for table in tables])
    return tuple(part.view(table.shape) for part, table in zip(parts, tables, strict=True))


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows can be read 16 bytes at a time, copied only if it must be."""
    per_16_bytes = 16 // tensor.element_size()
    strides = tensor.stride()
    fits = strides[2] == 1 and not any(stride % per_16_bytes for stride in strides[:2])
    if fits and tensor.data_ptr() % 16 == 0:
        return tensor
    padding = -tensor.shape[2] % per_16_bytes
    if not padding:
        return tensor.clone(memory_format=torch.contiguous_format)
    padded: Tensor = torch.nn.functional.pad(tensor, (0, padding))
    return padded[..., : tensor.shape[2]]


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
