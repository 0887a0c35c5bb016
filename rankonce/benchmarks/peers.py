"""Other implementations of segment attention and of the small operations.

An attention peer turns q, k and v into the form that it takes (not timed), computes (timed), and
turns its output back (for the comparison of values). So no peer pays for our layout.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from rankonce.benchmarks.block_mask import block_mask_of, dense_mask_of
from rankonce.benchmarks.runner import UnavailableError
from rankonce.benchmarks.workloads import PassShape
from rankonce.layout import SegmentLayout

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionPeer:
    """One way to compute segment attention.

    Attributes:
        prepare: q_THK, k_TGK, v_TGK to the peer's own inputs, differentiable.
        attend: the peer's own inputs to its outputs.
        unpack: its outputs to out_THK.
        note: what it does not pay for.
    """

    prepare: Callable[[Tensor, Tensor, Tensor], Tensors]
    attend: Callable[..., Tensors]
    unpack: Callable[[Tensors], Tensor]
    note: str | None = None


def heads_first(rows_THK: Tensor) -> Tensor:
    """View T x H x K as 1 x H x T x K."""
    return rows_THK.transpose(0, 1)[None]


def _repeat_heads(x_TGK: Tensor, q_THK: Tensor) -> Tensor:
    return x_TGK.repeat_interleave(q_THK.shape[1] // x_TGK.shape[1], dim=1)


def _rows_first(outputs: Tensors) -> Tensor:
    return outputs[0][0].transpose(0, 1)


def sdpa_dense(
    layout: SegmentLayout, backend: SDPBackend | None, *, device: str, dtype: torch.dtype
) -> AttentionPeer:
    """Scaled dot-product attention under a dense mask of T x T.

    Args:
        backend: PyTorch's own choice if ``None``.
    """
    seen_TT = dense_mask_of(layout, device)
    bias_TT = torch.zeros(seen_TT.shape, dtype=dtype, device=device)
    bias_TT.masked_fill_(~seen_TT, -torch.inf)
    del seen_TT

    def prepare(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensors:
        k_THK, v_THK = (_repeat_heads(x, q_THK) for x in (k_TGK, v_TGK))
        return heads_first(q_THK), heads_first(k_THK), heads_first(v_THK)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        if backend is None:
            return (F.scaled_dot_product_attention(q, k, v, attn_mask=bias_TT),)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, attn_mask=bias_TT),)

    note = "additive mask made and heads of k, v repeated beforehand"
    return AttentionPeer(prepare=prepare, attend=attend, unpack=_rows_first, note=note)


def flex(layout: SegmentLayout, *, device: str, compiled: bool) -> AttentionPeer:
    """FlexAttention with a block mask worked out from the spans."""
    mask = block_mask_of(layout, device)
    torch._dynamo.reset()
    function: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def prepare(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensors:
        return heads_first(q_THK), heads_first(k_TGK), heads_first(v_TGK)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        with warnings.catch_warnings():
            if not compiled:
                warnings.simplefilter("ignore", UserWarning)  # advises to compile
            out: Tensor = function(q, k, v, block_mask=mask, enable_gqa=True)
            return (out,)

    note = "block mask made beforehand" + ("" if compiled else "; not compiled")
    return AttentionPeer(prepare=prepare, attend=attend, unpack=_rows_first, note=note)


def _candidates(rows_THK: Tensor, shape: PassShape) -> Tensor:
    """View the candidates' rows as N x H x L x K."""
    rows_THK = rows_THK[shape.prefix_tokens :]
    return rows_THK.view(shape.num_candidates, -1, *rows_THK.shape[1:]).transpose(1, 2)


def _join(prefix_1HPK: Tensor, candidates_NHLK: Tensor) -> Tensor:
    return torch.cat(
        (prefix_1HPK[0].transpose(0, 1), candidates_NHLK.transpose(1, 2).flatten(0, 1))
    )


def sdpa_per_candidate(shape: PassShape) -> AttentionPeer:
    """One row of a batch per candidate, each with its own copy of the prefix's keys and values."""
    prefix, count = shape.prefix_tokens, shape.num_candidates
    visible = causal_lower_right(shape.candidate_tokens, shape.prompt_tokens)

    def prepare(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensors:
        expanded = [
            torch.cat(
                (heads_first(x[:prefix]).expand(count, -1, -1, -1), _candidates(x, shape)), dim=2
            )
            for x in (k_TGK, v_TGK)
        ]
        firsts = (heads_first(x[:prefix]) for x in (q_THK, k_TGK, v_TGK))
        return (*firsts, _candidates(q_THK, shape), *expanded)

    def attend(*tensors: Tensor) -> Tensors:
        q, k, v, q_NHLK, k_NGRK, v_NGRK = tensors
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        rest = F.scaled_dot_product_attention(q_NHLK, k_NGRK, v_NGRK, visible, enable_gqa=True)
        return first, rest

    note = "copies of the prefix made beforehand, their gradients not summed"
    return AttentionPeer(prepare=prepare, attend=attend, unpack=lambda out: _join(*out), note=note)


def sdpa_merged_halves(shape: PassShape, *, on_gpu: bool) -> AttentionPeer:
    """All candidates against the prefix, each against itself, merged by their log-sum-exps."""
    prefix = shape.prefix_tokens
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
    if not on_gpu:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def prepare(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensors:
        if not on_gpu:  # takes as many heads of keys as of queries
            k_TGK, v_TGK = (_repeat_heads(x, q_THK) for x in (k_TGK, v_TGK))
        firsts = (heads_first(x[:prefix]) for x in (q_THK, k_TGK, v_TGK))
        own = (_candidates(x, shape) for x in (q_THK, k_TGK, v_TGK))
        return (*firsts, heads_first(q_THK[prefix:]), *own)

    def attend(*tensors: Tensor) -> Tensors:
        q, k, v, q_rest, q_NHLK, k_NGLK, v_NGLK = tensors
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        on_prefix, prefix_lse = flash(q_rest, k, v)[:2]
        on_own, own_lse = flash(q_NHLK, k_NGLK, v_NGLK, 0.0, True)[:2]
        on_prefix = on_prefix[0].unflatten(1, own_lse.shape[::2]).transpose(0, 1)
        prefix_lse = prefix_lse[0].unflatten(1, own_lse.shape[::2]).transpose(0, 1)
        own_share = torch.sigmoid(own_lse - prefix_lse)[..., None]
        return first, torch.lerp(on_prefix.float(), on_own.float(), own_share).to(q.dtype)

    return AttentionPeer(prepare=prepare, attend=attend, unpack=lambda out: _join(*out))


def liger(name: str) -> Callable[..., Any]:
    """Return a function of ``liger_kernel.transformers.functional``.

    Raises:
        UnavailableError: Liger is not installed or has no such function.
    """
    try:
        module = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise UnavailableError("liger_kernel is not installed") from error
    if not hasattr(module, name):
        raise UnavailableError(f"liger_kernel has no {name}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def eager_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise as transformers' models do."""
    wide_TD = x_TD.float()
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    out_TD: Tensor = weight_D * wide_TD.to(x_TD.dtype)
    return out_TD


def eager_norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    *,
    eps: float,
) -> Tensors:
    """Normalise queries and keys and rotate them as transformers' Qwen3 does."""

    def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else eager_rms_norm(x, weight, eps)
        low, high = x.chunk(2, dim=-1)
        return x * cos_TK[:, None] + torch.cat((-high, low), dim=-1) * sin_TK[:, None]

    return rotate(q_THK, q_weight_K), rotate(k_TGK, k_weight_K)


def eager_gated_activation(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """SwiGLU as transformers' models compute it."""
    return F.silu(gate_TI) * up_TI
