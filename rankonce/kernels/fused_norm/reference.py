"""RMSNorm, rotary embedding and gated activation in plain PyTorch, for every device."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankonce.kernels.fp8_linear.reference import QuantizedRows, quantize_rows_reference

Activation = Literal["silu", "gelu_tanh"]


def rms_norm_reference(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    offset: float,
    residual_TD: Tensor | None,
    quantize: bool,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Add, then normalise; differentiable unless quantised."""
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    normed_TD = _normalize(sum_TD, weight_D, eps, offset)
    return (quantize_rows_reference(normed_TD) if quantize else normed_TD.to(x_TD.dtype)), sum_TD


def norm_rope_reference(
    q_THK: Tensor,
    k_TGK: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Normalise every head where there is a weight, then rotate; differentiable."""

    def rotate(x_THK: Tensor, weight_K: Tensor | None) -> Tensor:
        heads = _widen(x_THK) if weight_K is None else _normalize(x_THK, weight_K, eps, offset)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        out = heads * _widen(cos_TK)[:, None] + turned * _widen(sin_TK)[:, None]
        return out.to(x_THK.dtype)

    return rotate(q_THK, q_weight_K), rotate(k_TGK, k_weight_K)


def gated_activation_reference(
    gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, quantize: bool
) -> Tensor | QuantizedRows:
    """Activate the gate and multiply; differentiable unless quantised."""
    gate = _widen(gate_TI)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    out_TI = active * _widen(up_TI)
    return quantize_rows_reference(out_TI) if quantize else out_TI.to(gate_TI.dtype)


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return F.rms_norm(_widen(x), weight.shape, _widen(weight) + offset, eps)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
