"""Matrix products that keep FP32 whatever the dtypes of their operands."""

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Multiply in FP32 accuracy, or in FP64 where an operand is FP64.

    Rounding the result to 16 bits makes ranks collapse, so operands are widened before the product.
    A GPU multiplies 16-bit operands exactly and keeps the FP32 sums; there an FP32 operand that
    meets a bf16 one is split into three bf16 terms, so that nothing of the other's size is copied.

    Returns:
        product_MN in FP32 or FP64.
    """
    dtype = wide_dtype(a_MK, b_KN)
    dtypes = {a_MK.dtype, b_KN.dtype}
    if a_MK.is_cuda and dtype == torch.float32:
        if a_MK.dtype == b_KN.dtype != dtype:
            return torch.mm(a_MK, b_KN, out_dtype=dtype)
        if dtypes == {torch.float32, torch.bfloat16}:
            return _product_of_terms(a_MK, b_KN)
    return torch.mm(a_MK.to(dtype), b_KN.to(dtype))


def wide_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of a product of two tensors: FP32 or FP64."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def bfloat16_terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split FP32 numbers into three bf16 numbers each: 3 x 8 bits hold the 24 of FP32."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def _product_of_terms(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if a_MK.dtype == torch.float32:
        pairs = [(term, b_KN) for term in bfloat16_terms(a_MK)]
    else:
        pairs = [(a_MK, term) for term in bfloat16_terms(b_KN)]
    high, middle, low = (torch.mm(a, b, out_dtype=torch.float32) for a, b in pairs)
    return high + (middle + low)
