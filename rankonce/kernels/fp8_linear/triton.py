"""Row-wise quantisation on a GPU: every row is read once and written as FP8 with its scale."""

# Kernels carry no annotations, since Triton gives their arguments their types.

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from rankonce.kernels.fp8_linear.reference import QuantizedRows
from rankonce.kernels.variants import Variant

# 32 values a lane: four loads of 16 bytes in flight hide the latency, nothing spills.
_VALUES_PER_WARP = 1024
# Wider rows are read a second time, from L2, rather than held: 16 warps hold 16384 values.
MAX_COLUMNS = 16384
_SWEEP_COLUMNS = 4096


@triton.jit
def magnitudes(x):
    """|x| of fp32 as integers of the same order; NaN is the largest, where tl.max would drop it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scales(peaks):
    """A row's scale and its inverse from its largest magnitude, as ``quantize_rows`` has them."""
    amax = tl.maximum(peaks, 27 << 23).to(tl.float32, bitcast=True)  # the bits of AMAX_MIN
    return tl.div_rn(amax, 448.0), tl.div_rn(448.0, amax)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Quantise ROWS rows; COLUMNS below WIDTH: in two sweeps."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    real = (rows < num_rows)[:, None]
    x_ptr += rows[:, None] * x_stride
    values_ptr += rows[:, None] * WIDTH
    if COLUMNS >= WIDTH:
        mask = real & (columns < WIDTH)
        x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        scale, inverse = row_scales(tl.max(magnitudes(x), axis=1))
        tl.store(values_ptr + columns, (x * inverse[:, None]).to(tl.float8e4nv), mask=mask)
    else:
        peaks = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for start in range(0, WIDTH, COLUMNS):
            mask = real & (start + columns < WIDTH)
            x = tl.load(x_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, magnitudes(x))
        scale, inverse = row_scales(tl.max(peaks, axis=1))
        for start in range(0, WIDTH, COLUMNS):
            mask = real & (start + columns < WIDTH)
            x = tl.load(x_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            values = (x * inverse[:, None]).to(tl.float8e4nv)
            tl.store(values_ptr + start + columns, values, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


def row_tile(width: int) -> dict[str, Any]:
    """Constants of a kernel that needs whole rows: 1024 values a warp, narrow rows share one.

    A row that one warp holds is reduced by shuffles alone.
    """
    if width > MAX_COLUMNS:
        return {"COLUMNS": _SWEEP_COLUMNS, "ROWS": 1, "num_warps": 8, "num_stages": 1}
    columns = triton.next_power_of_2(width)
    return {
        "COLUMNS": columns,
        "ROWS": max(1, _VALUES_PER_WARP // columns),
        "num_warps": max(1, columns // _VALUES_PER_WARP),
        "num_stages": 1,
    }


def quantize_rows_config(width: int) -> dict[str, Any]:
    """Return the kernel's constants and launch options."""
    return {"WIDTH": width, **row_tile(width)}


def quantize_rows_triton(x_TD: Tensor) -> QuantizedRows:
    """Quantise rows of bf16, fp16 or fp32 with columns of stride 1."""
    num_rows, width = x_TD.shape
    values_TD = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    config = quantize_rows_config(width)
    grid = (triton.cdiv(num_rows, config["ROWS"]),)
    if num_rows:
        with torch.cuda.device_of(x_TD):
            quantize_rows_kernel[grid](x_TD, values_TD, scale_T, num_rows, x_TD.stride(0), **config)
    return QuantizedRows(values_TD=values_TD, scale_T=scale_T)


def machine_code_variants() -> list[Variant]:
    """Attention outputs of small and large models, and a row that takes two sweeps."""
    variants = []
    for width in (1024, 4096, 28672):
        config = quantize_rows_config(width)
        variants.append(
            Variant(
                name=f"quantize_rows-bf16-{width}",
                kernel=quantize_rows_kernel,
                signature={
                    "x_ptr": "*bf16",
                    "values_ptr": "*fp8e4nv",
                    "scale_ptr": "*fp32",
                    "num_rows": "i32",
                    "x_stride": "i64",
                },
                num_warps=config.pop("num_warps"),
                num_stages=config.pop("num_stages"),
                constexprs=config,
                min_capability=89,
                expects=("ld.global.v4.b32", "cvt.rn.satfinite.e4m3x2"),
            )
        )
    return variants
