"""Int8 products of CPUs: with VNNI or AMX exact at 8 bits, on AVX2 exact at 7.

Without VNNI the libraries add two products in 16 bits, which saturate: 255·127·2 > 32767. Rows of
7 bits keep every sum below (127·127·2), at the price of twice the rounding error of the inputs.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from rankonce.kernels.int8_linear.reference import INT8_MAX

# Seven bits: -63..63, stored from 1 to 127 around the zero point.
REDUCED_MAX = 63
_ZERO_POINT = 64
# Sizes of the probe: several vectors and a rest.
_PROBE = (17, 160, 35)


def int8_product_vnni(values_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """Multiply by oneDNN with 32-bit sums; T x N in int32."""
    return torch._int_mm(values_TD, weight_ND.t())


def pack_reduced(weight_ND: Tensor) -> torch.ScriptObject:
    """Lay a weight out for FBGEMM."""
    ones_N = torch.ones(len(weight_ND), dtype=torch.float64)
    zeros_N = torch.zeros(len(weight_ND), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch announces the end of its quantised tensors; FBGEMM takes nothing else.
        warnings.simplefilter("ignore", UserWarning)
        weight = torch._make_per_channel_quantized_tensor(
            weight_ND.contiguous(), ones_N, zeros_N, 0
        )
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, None)
    return packed


def int8_product_reduced(values_TD: Tensor, packed: torch.ScriptObject) -> Tensor:
    """Multiply rows of 7 bits by a packed weight; T x N in fp32, exact below 2**24."""
    product_TN: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        values_TD.float(), 1.0, _ZERO_POINT, packed
    )
    return product_TN


@cache
def cpu_path() -> str:
    """Find the product of this processor by trying each on the largest sums there can be.

    Returns:
        ``vnni``, ``reduced`` or ``reference``.
    """
    T, D, N = _PROBE
    weight_ND = torch.full((N, D), INT8_MAX, dtype=torch.int8)
    weight_ND[1::2] = -INT8_MAX
    for path, levels in (("vnni", INT8_MAX), ("reduced", REDUCED_MAX)):
        values_TD = torch.full((T, D), levels, dtype=torch.int8)
        values_TD[1::3] = -levels
        exact_TN = values_TD.long() @ weight_ND.long().T
        try:
            found_TN = (
                int8_product_vnni(values_TD, weight_ND)
                if path == "vnni" and torch.backends.mkldnn.is_available()
                else int8_product_reduced(values_TD, pack_reduced(weight_ND))
            )
        except RuntimeError:  # the build has no such engine
            continue
        if torch.equal(found_TN.long(), exact_TN):
            return path
    return "reference"
