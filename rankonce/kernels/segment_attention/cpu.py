"""Segment attention on a CPU: few large products instead of one small one a candidate.

All rows that share a prefix meet it in one unmasked product; segments of similar length meet
themselves in one padded, causal batch; the two halves are merged by their log-sum-exps, exactly
(Milakov & Gimelshein 2018; as FlashAttention merges its tiles). The backward pass gives each half
the merged output and log-sum-exp, from which its own gradients follow exactly.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rankonce.kernels.segment_attention.spans import SegmentSpans

# A block's longest segment over its shortest, at most; lengths up to 5 share a block.
_MAX_LENGTH_RATIO = 1.25


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Spans of similar length, padded to the longest.

    Attributes:
        query_rows, real: rows n x Q, and which of them are not padding.
        key_rows, real_keys: the same of the keys, n x L.
        mask: n x 1 x Q x L, true where a query sees a key; none for causal attention.
    """

    query_rows: Tensor
    real: Tensor
    key_rows: Tensor
    real_keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Consecutive tokens that see the same prefix."""

    query_start: int
    query_end: int
    prefix_start: int
    prefix_end: int


@lru_cache(maxsize=4)
def _plan(spans: SegmentSpans) -> tuple[list[_Block], list[_Shared]]:
    """Group the spans; kept for the layers of a pass."""
    rows = spans.rows()
    shared: list[_Shared] = []
    for query_start, query_end, _, _, prefix_start, prefix_end in rows:
        if prefix_start == prefix_end:
            continue
        last = shared[-1] if shared else None
        start = query_start
        if (
            last
            and last.query_end == query_start
            and (last.prefix_start, last.prefix_end) == (prefix_start, prefix_end)
        ):
            start = shared.pop().query_start
        shared.append(
            _Shared(
                query_start=start,
                query_end=query_end,
                prefix_start=prefix_start,
                prefix_end=prefix_end,
            )
        )
    blocks: list[_Block] = []
    group: list[tuple[int, int, int, int]] = []
    for span in sorted((r[3] - r[2], r[1] - r[0], r[0], r[2]) for r in rows):
        # Spans with as many queries as keys are causal, others need a mask: they do not mix.
        if group and (
            span[0] > max(4, group[0][0]) * _MAX_LENGTH_RATIO
            or _is_causal(span) != _is_causal(group[0])
        ):
            blocks.append(_pad(group))
            group = []
        group.append(span)
    if group:
        blocks.append(_pad(group))
    return blocks, shared


def _is_causal(span: tuple[int, int, int, int]) -> bool:
    return span[0] == span[1]


def _pad(group: list[tuple[int, int, int, int]]) -> _Block:
    """Pad spans, each the number of its keys and queries and the first of both."""
    num_keys, num_queries, query_starts, key_starts = (
        torch.tensor(column) for column in zip(*group, strict=True)
    )
    query_steps = torch.arange(int(num_queries.max()))
    key_steps = torch.arange(int(num_keys.max()))
    # Padding repeats a span's last row: finite numbers that no real row sees.
    mask = None
    if not _is_causal(group[0]):
        last_seen = (num_keys - num_queries)[:, None] + query_steps
        mask = (key_steps <= last_seen[:, :, None])[:, None]
    return _Block(
        query_rows=query_starts[:, None] + torch.minimum(query_steps, num_queries[:, None] - 1),
        key_rows=key_starts[:, None] + torch.minimum(key_steps, num_keys[:, None] - 1),
        real=query_steps < num_queries[:, None],
        real_keys=key_steps < num_keys[:, None],
        mask=mask,
    )


def segment_attention_cpu(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: SegmentSpans, *, scale: float
) -> Tensor:
    """Compute segment attention with gradients; shapes as in ``segment_attention``."""
    num_shared = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK = k_SGK.repeat_interleave(num_shared, dim=1)
    v_SHK = v_SGK.repeat_interleave(num_shared, dim=1)
    out: Tensor = _SegmentAttention.apply(q_THK, k_SHK, v_SHK, spans, scale)  # type: ignore[no-untyped-call]
    return out


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, spans: SegmentSpans, scale: float
    ) -> Tensor:
        blocks, shared = _plan(spans)
        out_THK = torch.empty_like(q_THK)
        lse_TH = torch.empty(q_THK.shape[:2], dtype=torch.promote_types(q_THK.dtype, torch.float32))
        for block in blocks:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q_THK[block.query_rows]),
                _heads_first(k_SHK[block.key_rows]),
                _heads_first(v_SHK[block.key_rows]),
                0.0,
                block.mask is None,
                attn_mask=_additive(block.mask, q_THK.dtype),
                scale=scale,
            )
            block_rows = block.query_rows[block.real]
            out_THK[block_rows] = out.transpose(1, 2)[block.real]
            lse_TH[block_rows] = lse.transpose(1, 2)[block.real]
        for part in shared:
            rows = slice(part.query_start, part.query_end)
            keys = slice(part.prefix_start, part.prefix_end)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q_THK[None, rows]),
                _heads_first(k_SHK[None, keys]),
                _heads_first(v_SHK[None, keys]),
                scale=scale,
            )
            prefix_lse = lse[0].transpose(0, 1)
            merged_lse = torch.logaddexp(lse_TH[rows], prefix_lse)
            own_weight = torch.exp(lse_TH[rows] - merged_lse)[..., None]
            prefix_weight = torch.exp(prefix_lse - merged_lse)[..., None]
            merged = out_THK[rows] * own_weight + out[0].transpose(0, 1) * prefix_weight
            out_THK[rows] = merged.to(out_THK.dtype)
            lse_TH[rows] = merged_lse
        ctx.save_for_backward(q_THK, k_SHK, v_SHK, out_THK, lse_TH)
        ctx.spans, ctx.scale = spans, scale
        return out_THK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad_THK,) = grads
        q_THK, k_SHK, v_SHK, out_THK, lse_TH = ctx.saved_tensors
        blocks, shared = _plan(ctx.spans)
        grad_q, grad_k, grad_v = (torch.zeros_like(tensor) for tensor in (q_THK, k_SHK, v_SHK))
        for block in blocks:
            grad_block = grad_THK[block.query_rows] * block.real[..., None, None]
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad_block),
                _heads_first(q_THK[block.query_rows]),
                _heads_first(k_SHK[block.key_rows]),
                _heads_first(v_SHK[block.key_rows]),
                _heads_first(out_THK[block.query_rows]),
                lse_TH[block.query_rows].transpose(1, 2),
                0.0,
                block.mask is None,
                attn_mask=_additive(block.mask, q_THK.dtype),
                scale=ctx.scale,
            )
            grad_q[block.query_rows[block.real]] = dq.transpose(1, 2)[block.real]
            keys = block.key_rows[block.real_keys]
            grad_k[keys] = dk.transpose(1, 2)[block.real_keys]
            grad_v[keys] = dv.transpose(1, 2)[block.real_keys]
        for part in shared:
            rows = slice(part.query_start, part.query_end)
            prefix = slice(part.prefix_start, part.prefix_end)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad_THK[None, rows]),
                _heads_first(q_THK[None, rows]),
                _heads_first(k_SHK[None, prefix]),
                _heads_first(v_SHK[None, prefix]),
                _heads_first(out_THK[None, rows]),
                lse_TH[None, rows].transpose(1, 2),
                0.0,
                False,
                scale=ctx.scale,
            )
            grad_q[rows] += dq[0].transpose(0, 1)
            grad_k[prefix] += dk[0].transpose(0, 1)
            grad_v[prefix] += dv[0].transpose(0, 1)
        return grad_q, grad_k, grad_v, None, None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _heads_first(rows_nLHK: Tensor) -> Tensor:
    return rows_nLHK.transpose(1, 2)
