"""What stands between the matrix products of a layer, fused: norm, rotary embedding, activation.

The reference is short and differentiable. On a GPU, without gradients, each operation is one
Triton kernel, which can also quantise its result for the FP8 product that comes next. The path
taken is logged once.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from rankonce.errors import ShapeError
from rankonce.kernels.fp8_linear import (
    QuantizedRows,
    check_rows,
    refuse_gradients,
    runs_triton,
)
from rankonce.kernels.fused_norm.reference import (
    Activation,
    gated_activation_reference,
    norm_rope_reference,
    rms_norm_reference,
)

__all__ = ["Activation", "gated_activation", "norm_rope", "rms_norm"]

logger = logging.getLogger(__name__)

# A program of the kernel holds whole rows.
_MAX_NORM_WIDTH = 16384


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    residual_TD: Tensor | None = None,
    quantize: bool = False,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Root mean square norm of ``x + residual`` (Zhang & Sennrich 2019), rounded once.

    Args:
        x_TD: bf16 | fp16 | fp32, columns of stride 1; rows may be strided.
        weight_D: any floating dtype.
        eps: added to the mean square.
        offset: added to the weight: 1.0 for Gemma, whose weights are stored less one.
        residual_TD: added to x first, in its dtype.
        quantize: return the normed rows in FP8, quantised from fp32 as by ``quantize_rows``.

    Returns:
        normed_TD in x's dtype or QuantizedRows, and sum_TD in x's dtype, of which it is the norm;
        the sum is x itself where there is no residual.

    Raises:
        ShapeError: names what was expected and what came.
    """
    check_rows("x", x_TD)
    _check_same(x_TD, weight=(weight_D, x_TD.shape[1:], None))
    if residual_TD is not None:
        check_rows("residual", residual_TD)
        _check_same(x_TD, residual=(residual_TD, x_TD.shape, x_TD.dtype))
    if quantize:
        refuse_gradients(x=x_TD, weight=weight_D, residual=residual_TD)
    fits = x_TD.shape[1] <= _MAX_NORM_WIDTH
    if fits and _on_triton(x_TD, weight_D, residual_TD, fp8=quantize):
        from rankonce.kernels.fused_norm.triton import rms_norm_triton

        path, run = "triton", rms_norm_triton
    else:
        path, run = "reference", rms_norm_reference
    _log_path("rms_norm", path)
    return run(x_TD, weight_D, eps=eps, offset=offset, residual_TD=residual_TD, quantize=quantize)


def norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    q_weight_K: Tensor | None = None,
    k_weight_K: Tensor | None = None,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalise every head where it has a weight, then rotate it by its token's position.

    The rotation turns the first half of a head against the second (Su et al. 2021, in the layout
    of GPT-NeoX and transformers): ``x * cos + rotate_half(x) * sin``, in fp32, rounded once.

    Args:
        q_THK, k_TGK: bf16 | fp16 | fp32, last stride 1; may be views of one fused projection.
        cos_TK, sin_TK: from the model's rotary embedding, any floating dtype, last stride 1.
        q_weight_K, k_weight_K: weights of the norms of Qwen3 and Gemma 3; None: no norm.
        eps: added to the mean square of a head.
        offset: added to the weights: 1.0 for Gemma.

    Returns:
        q_THK and k_TGK, contiguous, in their dtypes.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check_heads(q_THK, k_TGK)
    num_tokens, _, head_size = q_THK.shape
    angles = torch.Size((num_tokens, head_size))
    _check_same(
        q_THK,
        cos=(cos_TK, angles, None),
        sin=(sin_TK, angles, None),
        q_weight=(q_weight_K, angles[1:], None),
        k_weight=(k_weight_K, angles[1:], None),
    )
    for name, tensor in (("q", q_THK), ("k", k_TGK), ("cos", cos_TK), ("sin", sin_TK)):
        if tensor.stride(-1) != 1:
            raise ShapeError(f"{name}: should have a last stride of 1, has {tensor.stride(-1)}")
    if _on_triton(q_THK, k_TGK, cos_TK, sin_TK, q_weight_K, k_weight_K):
        from rankonce.kernels.fused_norm.triton import norm_rope_triton

        path, run = "triton", norm_rope_triton
    else:
        path, run = "reference", norm_rope_reference
    _log_path("norm_rope", path)
    return run(
        q_THK,
        k_TGK,
        cos_TK,
        sin_TK,
        q_weight_K=q_weight_K,
        k_weight_K=k_weight_K,
        eps=eps,
        offset=offset,
    )


def gated_activation(
    gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, quantize: bool = False
) -> Tensor | QuantizedRows:
    """``act(gate) * up`` in fp32, rounded once (Shazeer 2020).

    Args:
        gate_TI, up_TI: bf16 | fp16 | fp32, columns of stride 1; may be halves of one tensor.
        activation: ``silu``, or ``gelu_tanh`` for GELU in its tanh form.
        quantize: return the rows in FP8, quantised from fp32 as by ``quantize_rows``.

    Returns:
        out_TI in gate's dtype, or QuantizedRows.

    Raises:
        ShapeError: names what was expected and what came.
    """
    check_rows("gate", gate_TI)
    check_rows("up", up_TI)
    _check_same(gate_TI, up=(up_TI, gate_TI.shape, gate_TI.dtype))
    if activation not in ("silu", "gelu_tanh"):
        raise ShapeError(f"activation: should be silu or gelu_tanh, is {activation}")
    if quantize:
        refuse_gradients(gate=gate_TI, up=up_TI)
    if _on_triton(gate_TI, up_TI, fp8=quantize):
        from rankonce.kernels.fused_norm.triton import gated_activation_triton

        path, run = "triton", gated_activation_triton
    else:
        path, run = "reference", gated_activation_reference
    _log_path("gated_activation", path)
    return run(gate_TI, up_TI, activation=activation, quantize=quantize)


def _on_triton(x: Tensor, *others: Tensor | None, fp8: bool = False) -> bool:
    """The kernels have no backward pass."""
    tensors = (x, *others)
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    return not needs_gradients and runs_triton(x, fp8=fp8)


def _check_same(x: Tensor, **others: tuple[Tensor | None, torch.Size, torch.dtype | None]) -> None:
    """Hold each tensor against the shape and, unless None, the dtype that it should have."""
    for name, (tensor, shape, dtype) in others.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(f"{name}: should have shape {shape}, has {tensor.shape}")
        if not tensor.is_floating_point() or (dtype is not None and tensor.dtype != dtype):
            wanted = "a floating dtype" if dtype is None else dtype
            raise ShapeError(f"{name}: should have {wanted}, has {tensor.dtype}")
        if tensor.device != x.device:
            raise ShapeError(f"{name}: should be on {x.device}, is on {tensor.device}")


def _check_heads(q_THK: Tensor, k_TGK: Tensor) -> None:
    if q_THK.ndim != 3 or k_TGK.ndim != 3:
        raise ShapeError(f"q, k: should be THK and TGK, are {q_THK.shape} and {k_TGK.shape}")
    if q_THK.shape[0] != k_TGK.shape[0] or q_THK.shape[2] != k_TGK.shape[2]:
        raise ShapeError(
            f"k: should have q's {q_THK.shape[0]} tokens and head size {q_THK.shape[2]}, "
            f"has shape {k_TGK.shape}"
        )
    if q_THK.shape[2] % 2 or not q_THK.shape[2]:
        raise ShapeError(f"q: should have an even head size, has {q_THK.shape[2]}")
    if not q_THK.is_floating_point() or q_THK.dtype != k_TGK.dtype:
        raise ShapeError(
            f"q, k: should share one floating dtype, are {q_THK.dtype} and {k_TGK.dtype}"
        )


@cache
def _log_path(operation: str, path: str) -> None:
    logger.info("%s runs on its %s path", operation, path)
