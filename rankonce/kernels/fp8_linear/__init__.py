"""Linear layers in FP8: quantise rows, multiply, rescale.

Every row of the input and every output channel of the weight has a scale of its own, so a
candidate's numbers never depend on its neighbours. The path taken is logged once.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn

from rankonce.errors import ShapeError
from rankonce.kernels.fp8_linear.reference import (
    QuantizedRows,
    fp8_linear_reference,
    quantize_rows_reference,
)

__all__ = [
    "Fp8Linear",
    "QuantizedRows",
    "fits_fp8",
    "fp8_linear",
    "has_fp8",
    "quantize_rows",
]

logger = logging.getLogger(__name__)

# FP8 tensor cores take sizes in multiples of 16.
_MULTIPLE = 16
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_rows(x_TD: Tensor) -> QuantizedRows:
    """Quantise every row to float8_e4m3fn with its own scale.

    With ``amax`` the row's largest magnitude (at least 2**-100), the scale is ``amax / 448`` and a
    value is ``x * (448 / amax)`` in fp32, rounded to the nearest e4m3 number. A row that holds NaN
    or infinity gets a scale that is not finite, so nothing computed from it is. No gradients.

    Args:
        x_TD: bf16 | fp16 | fp32, columns of stride 1; rows may be strided.

    Returns:
        QuantizedRows, contiguous.

    Raises:
        ShapeError: names what was expected and what came.
    """
    check_rows("x", x_TD)
    refuse_gradients(x=x_TD)
    if runs_triton(x_TD, fp8=True):
        from rankonce.kernels.fp8_linear.triton import quantize_rows_triton

        _log_path("quantize_rows", "triton")
        return quantize_rows_triton(x_TD)
    _log_path("quantize_rows", "reference")
    return quantize_rows_reference(x_TD)


def fp8_linear(
    x: QuantizedRows,
    weight: QuantizedRows,
    *,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply quantised rows by a quantised weight: ``x @ weight.T + bias``.

    On GPUs with FP8 tensor cores the product is PyTorch's row-wise ``_scaled_mm``, which rounds to
    bf16 before ``out_dtype`` and accumulates fast (Hopper: about 14 bits a step); elsewhere the
    FP8 values are multiplied in fp32.

    Args:
        x: T rows of D columns.
        weight: N output channels of D columns; D and N multiples of 16.
        bias_N: added before rounding.
        out_dtype: bf16 | fp16 | fp32.

    Returns:
        out_TN.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check_product(x, weight, bias_N)
    if x.values_TD.is_cuda and has_fp8(x.values_TD.device):
        _log_path("fp8_linear", "scaled_mm")
        return _scaled_product(x, weight, bias_N, out_dtype)
    _log_path("fp8_linear", "reference")
    return fp8_linear_reference(x, weight, bias_N=bias_N, out_dtype=out_dtype)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in FP8 only; for inference.

    ``.to(dtype)`` changes the dtype of the output and of the bias, never the quantised weight.

    Args:
        in_features, out_features: multiples of 16.
        bias: whether it adds one.
        dtype: of the bias, and of the output where the input comes quantised.
        device: where its buffers lie.
    """

    values_ND: Tensor
    scale_N: Tensor
    bias_N: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % _MULTIPLE or out_features % _MULTIPLE:
            raise ShapeError(
                f"in_features, out_features: should be multiples of {_MULTIPLE}, "
                f"are {in_features} and {out_features}"
            )
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        values_ND = torch.zeros(
            (out_features, in_features), dtype=torch.float8_e4m3fn, device=device
        )
        self.register_buffer("values_ND", values_ND)
        self.register_buffer("scale_N", torch.ones(out_features, device=device))
        bias_N = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias_N", bias_N)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantise a layer's weight, a scale for every output channel.

        Raises:
            ShapeError: sizes that ``fits_fp8`` refuses.
        """
        weight_ND, bias = linear.weight.detach(), linear.bias
        quantized = quantize_rows(weight_ND)
        layer = cls.from_rows(
            quantized.values_TD,
            quantized.scale_T,
            bias_N=None if bias is None else bias.detach().clone(),
            dtype=weight_ND.dtype,
        )
        return layer.train(linear.training)

    @classmethod
    def from_rows(
        cls, values_ND: Tensor, scale_N: Tensor, *, bias_N: Tensor | None, dtype: torch.dtype
    ) -> Self:
        """Make a layer of a quantised weight, whose memory it takes over.

        Raises:
            ShapeError: sizes that ``fits_fp8`` refuses.
        """
        out_features, in_features = values_ND.shape
        # Built without storage: the quantised weight takes the places.
        layer = cls(in_features, out_features, bias=bias_N is not None, dtype=dtype, device="meta")
        layer.values_ND, layer.scale_N, layer.bias_N = values_ND, scale_N, bias_N
        return layer

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Return ``...N`` for ``...D`` in its dtype, or TN for quantised rows in the layer's."""
        weight = QuantizedRows(values_TD=self.values_ND, scale_T=self.scale_N)
        if isinstance(x, QuantizedRows):
            return fp8_linear(x, weight, bias_N=self.bias_N, out_dtype=self.dtype)
        rows = quantize_rows(x.reshape(-1, x.shape[-1]))
        out_TN = fp8_linear(rows, weight, bias_N=self.bias_N, out_dtype=x.dtype)
        return out_TN.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias_N is not None}, dtype={self.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {"values_ND": self.values_ND, "scale_N": self.scale_N}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale_N.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def fits_fp8(linear: nn.Linear) -> bool:
    """Say whether a layer's sizes are multiples of 16, as FP8 products need them."""
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0


@cache
def has_fp8(device: torch.device) -> bool:
    """Say whether a CUDA device has FP8 tensor cores."""
    return _has_triton(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def runs_triton(x: Tensor, *, fp8: bool = False) -> bool:
    """Say whether Triton kernels, with or without FP8, run on a tensor's device and dtype."""
    if not x.is_cuda or x.dtype not in _KERNEL_DTYPES:
        return False
    return has_fp8(x.device) if fp8 else _has_triton(x.device)


@cache
def _has_triton(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return (
        torch.version.cuda is not None and capability >= (8, 0) and find_spec("triton") is not None
    )


def check_rows(name: str, x_TD: Tensor) -> None:
    """Refuse what is no matrix of floating numbers with columns of stride 1.

    Raises:
        ShapeError: names what was expected and what came.
    """
    if x_TD.ndim != 2 or not x_TD.shape[1]:
        raise ShapeError(f"{name}: should be a matrix with columns, has shape {x_TD.shape}")
    if not x_TD.is_floating_point() or x_TD.dtype.itemsize < 2:
        raise ShapeError(f"{name}: should be bf16, fp16 or fp32, is {x_TD.dtype}")
    if x_TD.stride(1) != 1 and x_TD.shape[1] > 1:
        raise ShapeError(f"{name}: should have columns of stride 1, has {x_TD.stride(1)}")


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Refuse to cut a graph in silence: FP8 has no gradients.

    Raises:
        ShapeError: names the tensor that requires them.
    """
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ShapeError(f"{name}: should not require gradients in FP8; use torch.no_grad()")


def _scaled_product(
    x: QuantizedRows, weight: QuantizedRows, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out_TN: Tensor = torch._scaled_mm(
        x.values_TD.contiguous(),
        weight.values_TD.contiguous().t(),
        scale_a=x.scale_T[:, None],
        scale_b=weight.scale_T[None, :],
        bias=None if bias_N is None else bias_N.to(torch.bfloat16),
        # Row-wise scales go with this output on every GPU and version that has them.
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out_TN.to(out_dtype)


def _check_product(x: QuantizedRows, weight: QuantizedRows, bias_N: Tensor | None) -> None:
    for name, rows in (("x", x), ("weight", weight)):
        dtypes: tuple[Any, ...] = (rows.values_TD.dtype, rows.scale_T.dtype)
        if dtypes != (torch.float8_e4m3fn, torch.float32):
            raise ShapeError(f"{name}: should be float8_e4m3fn with fp32 scales, is {dtypes}")
        if rows.values_TD.ndim != 2 or rows.scale_T.shape != rows.shape[:1]:
            raise ShapeError(
                f"{name}: should be a matrix with a scale for each row, has {rows.shape} and "
                f"{rows.scale_T.shape}"
            )
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(f"x: should have weight's {weight.shape[1]} columns, has {x.shape[1]}")
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        raise ShapeError(f"weight: sizes should be multiples of {_MULTIPLE}, are {weight.shape}")
    if bias_N is not None and bias_N.shape != weight.shape[:1]:
        raise ShapeError(f"bias: should have {weight.shape[0]} entries, has {bias_N.shape}")


@cache
def _log_path(operation: str, path: str) -> None:
    logger.info("%s runs on its %s path", operation, path)
