"""Row-wise int8 in plain PyTorch, for every device."""

import torch
from torch import Tensor

# Symmetric: -128 is never used, so that a value and its negative are equally precise.
INT8_MAX = 127
# Below it a row's largest magnitude counts as this: zero rows give zeros.
AMAX_MIN = 2.0**-100


def quantize_int8_rows(x_TD: Tensor, *, levels: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Quantise every row by its own largest magnitude.

    Args:
        x_TD: bf16 | fp16 | fp32.
        levels: integers on either side of 0, at most 127.

    Returns:
        values_TD in int8 and scale_T in fp32: ``x ≈ values * scale``. The scale of a row that
        holds NaN or infinity is not finite, so nothing computed from it is.
    """
    rows_TD = x_TD.float()
    scale_T = rows_TD.abs().amax(dim=-1).clamp(min=AMAX_MIN) / levels
    return (rows_TD / scale_T[:, None]).round().to(torch.int8), scale_T


def int8_product_reference(values_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """Multiply int8 by int8 exactly; returns T x N in fp32, rounded once from fp64."""
    return (values_TD.double() @ weight_ND.double().T).float()
