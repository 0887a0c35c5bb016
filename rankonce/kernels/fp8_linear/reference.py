"""Row-wise FP8 in plain PyTorch, for every device."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0
# Below it a row's largest magnitude counts as this: zero rows give zeros, 448 / amax is finite.
AMAX_MIN = 2.0**-100


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedRows:
    """A matrix in FP8 with one scale a row: ``values * scale``.

    Attributes:
        values_TD: float8_e4m3fn.
        scale_T: fp32, positive; not finite for a row that held NaN or infinity.
    """

    values_TD: Tensor
    scale_T: Tensor

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.values_TD.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in a wider dtype, multiplied in fp32."""
        return (self.values_TD.float() * self.scale_T[:, None]).to(dtype)


@torch.no_grad()
def quantize_rows_reference(x_TD: Tensor) -> QuantizedRows:
    """Quantise every row by its own largest magnitude; shapes as in ``quantize_rows``."""
    rows_TD = x_TD.float()
    # amax and clamp hand NaN on, so the scale of a row that holds one is NaN.
    amax_T = rows_TD.abs().amax(dim=-1).clamp(min=AMAX_MIN)
    # Tensors on both sides: PyTorch divides with plain numbers by way of a rounded reciprocal.
    max_T = torch.full_like(amax_T, FP8_MAX)
    scaled_TD = rows_TD * (max_T / amax_T)[:, None]
    return QuantizedRows(
        values_TD=scaled_TD.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn),
        scale_T=amax_T / max_T,
    )


def fp8_linear_reference(
    x: QuantizedRows, weight: QuantizedRows, *, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Multiply the FP8 values in fp32, then rescale; shapes as in ``fp8_linear``."""
    out_TN = x.values_TD.float() @ weight.values_TD.float().T
    out_TN = out_TN * x.scale_T[:, None] * weight.scale_T
    return (out_TN if bias_N is None else out_TN + bias_N.float()).to(out_dtype)
