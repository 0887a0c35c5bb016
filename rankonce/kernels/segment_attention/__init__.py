"""Attention in which a token sees its own segment and its prefix.

One function, several paths, each with gradients: the reference is short and takes every option; the
CPU path computes the same with a few large products; the Triton path runs on a GPU. The path taken
is logged once.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from rankonce.errors import ShapeError
from rankonce.kernels.segment_attention.cpu import segment_attention_cpu
from rankonce.kernels.segment_attention.reference import segment_attention_reference
from rankonce.kernels.segment_attention.spans import SegmentSpans, last_queries

__all__ = ["SegmentSpans", "last_queries", "segment_attention"]

logger = logging.getLogger(__name__)


def segment_attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    spans: SegmentSpans,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention in which a token sees its prefix and its own segment up to itself.

    Args:
        q_THK: queries, bf16 | fp16 | fp32 | fp64; H divisible by G.
        k_SGK, v_SGK: keys and values; S >= T when cached prefixes come first.
        spans: query and key ranges of every span; each query stands in exactly one.
        scale: logit multiplier above 0, usually ``K ** -0.5``.
        softcap: bounds the logits to ``softcap * tanh(logit / softcap)``, as Gemma 2 does.
        window: a query sees this many last tokens of its own prompt, itself included.

    Returns:
        out_THK in q's dtype, accumulated in at least fp32.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check(q_THK, k_SGK, v_SGK, spans, scale)
    if not len(q_THK):
        return torch.empty_like(q_THK)
    if window is not None and not spans.shortened(window):
        window = None
    if q_THK.device.type == "cpu" and softcap is None and window is None:
        _log_path("cpu")
        return segment_attention_cpu(q_THK, k_SGK, v_SGK, spans, scale=scale)
    if q_THK.device.type == "cuda" and q_THK.dtype != torch.float64:
        from rankonce.kernels.segment_attention.triton import segment_attention_triton

        _log_path("triton")
        return segment_attention_triton(
            q_THK, k_SGK, v_SGK, spans, scale=scale, softcap=softcap, window=window
        )
    _log_path("reference")
    return segment_attention_reference(
        q_THK, k_SGK, v_SGK, spans, scale=scale, softcap=softcap, window=window
    )


def _check(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: SegmentSpans, scale: float) -> None:
    if not scale > 0:
        raise ShapeError(f"scale: should be above 0, is {scale}")
    if q_THK.ndim != 3 or k_SGK.ndim != 3:
        raise ShapeError(f"q, k: should be THK and SGK, are {q_THK.shape} and {k_SGK.shape}")
    if k_SGK.shape != v_SGK.shape:
        raise ShapeError(f"v: should have k's shape {k_SGK.shape}, has {v_SGK.shape}")
    if q_THK.shape[2] != k_SGK.shape[2]:
        raise ShapeError(f"k: should have q's head size {q_THK.shape[2]}, has {k_SGK.shape[2]}")
    if q_THK.shape[1] % k_SGK.shape[1]:
        raise ShapeError(
            f"q: {q_THK.shape[1]} heads should be a multiple of k's {k_SGK.shape[1]} heads"
        )
    if spans.num_queries != q_THK.shape[0]:
        raise ShapeError(f"q: should have the spans' {spans.num_queries} rows, has {len(q_THK)}")
    if k_SGK.shape[0] < spans.num_keys:
        raise ShapeError(f"k: should have at least {spans.num_keys} rows, has {k_SGK.shape[0]}")
    if not q_THK.dtype == k_SGK.dtype == v_SGK.dtype or not q_THK.is_floating_point():
        raise ShapeError(
            f"q, k, v: should share one floating dtype, are {q_THK.dtype}, {k_SGK.dtype}, "
            f"{v_SGK.dtype}"
        )


@cache
def _log_path(path: str) -> None:
    logger.info("segment_attention runs on its %s path", path)
