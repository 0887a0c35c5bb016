"""Linear layers in int8 for CPUs: quantise rows, multiply, rescale.

Every row of the input and every output channel of the weight has a scale of its own. PyTorch's
dynamic quantisation has one scale for a whole input, so that a candidate's numbers would depend on
its neighbours. The path taken is logged once.
"""

import logging
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from rankonce.errors import ShapeError
from rankonce.kernels.int8_linear.cpu import (
    REDUCED_MAX,
    cpu_path,
    int8_product_reduced,
    int8_product_vnni,
    pack_reduced,
)
from rankonce.kernels.int8_linear.reference import (
    INT8_MAX,
    int8_product_reference,
    quantize_int8_rows,
)

__all__ = ["Int8Linear", "int8_linear", "quantize_int8_rows"]

logger = logging.getLogger(__name__)


def int8_linear(
    x_TD: Tensor,
    weight_ND: Tensor,
    scale_N: Tensor,
    *,
    bias_N: Tensor | None = None,
    packed: Any = None,
) -> Tensor:
    """Quantise every row of ``x``, multiply by an int8 weight, rescale: ``x @ weight.T + bias``.

    On a CPU with VNNI or AMX the product is oneDNN's with 32-bit sums. On other x86 processors it
    is FBGEMM's over rows of 7 bits, whose sums do not saturate. Elsewhere it is computed in fp64.
    No gradients.

    Args:
        x_TD: bf16 | fp16 | fp32.
        weight_ND: int8, -127..127.
        scale_N: fp32, one for each output channel.
        bias_N: added before rounding.
        packed: the weight as ``pack_reduced`` gives it, where it is kept.

    Returns:
        out_TN in x's dtype.

    Raises:
        ShapeError: names what was expected and what came.
    """
    if x_TD.ndim != 2 or x_TD.shape[1] != weight_ND.shape[1]:
        raise ShapeError(f"x: should be rows of {weight_ND.shape[1]} columns, is {x_TD.shape}")
    if weight_ND.dtype != torch.int8 or scale_N.shape != weight_ND.shape[:1]:
        raise ShapeError(
            f"weight: should be int8 with a scale for each of its {len(weight_ND)} rows, is "
            f"{weight_ND.dtype} with {tuple(scale_N.shape)}"
        )
    if torch.is_grad_enabled() and x_TD.requires_grad:
        raise ShapeError("x: should not require gradients in int8; use torch.no_grad()")
    path = cpu_path() if x_TD.device.type == "cpu" else "reference"
    _log_path("int8_linear", path)
    levels = REDUCED_MAX if path == "reduced" else INT8_MAX
    values_TD, scale_T = quantize_int8_rows(x_TD, levels=levels)
    if path == "vnni":
        product_TN = int8_product_vnni(values_TD, weight_ND)
    elif path == "reduced":
        # Not "packed or": the truth of a ScriptObject asks for a length that it does not have.
        packed = pack_reduced(weight_ND) if packed is None else packed
        product_TN = int8_product_reduced(values_TD, packed)
    else:
        product_TN = int8_product_reference(values_TD, weight_ND)
    out_TN = product_TN * scale_T[:, None]
    # Both multiplications in fp32: a product of two scales first would round differently by size.
    out_TN = out_TN.mul_(scale_N) if bias_N is None else torch.addcmul(bias_N, out_TN, scale_N)
    return out_TN.to(x_TD.dtype)


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in int8 only; for inference.

    Args:
        values_ND: int8.
        scale_N: fp32.
        bias_N: kept in fp32.
    """

    values_ND: Tensor
    scale_N: Tensor
    bias_N: Tensor | None

    def __init__(self, values_ND: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("values_ND", values_ND)
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("bias_N", None if bias_N is None else bias_N.detach().float())
        self._packed: Any = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantise a layer's weight, a scale for every output channel."""
        return cls(*quantize_int8_rows(linear.weight.detach()), linear.bias)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.values_ND.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.values_ND.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``...N`` for ``...D`` in its dtype."""
        if x.device.type == "cpu" and cpu_path() == "reduced" and self._packed is None:
            self._packed = pack_reduced(self.values_ND)
        rows = x.reshape(-1, x.shape[-1])
        out_TN = int8_linear(
            rows, self.values_ND, self.scale_N, bias_N=self.bias_N, packed=self._packed
        )
        return out_TN.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias_N is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Scales and bias stay in fp32 whatever dtype the model is sent to.
        kept = {"scale_N": self.scale_N, "bias_N": self.bias_N}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


@cache
def _log_path(operation: str, path: str) -> None:
    logger.info("%s runs on its %s path", operation, path)
