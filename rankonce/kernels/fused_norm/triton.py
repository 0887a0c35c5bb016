"""RMSNorm, rotary embedding and gated activation on a GPU, each in one pass over memory.

All arithmetic is fp32; a result is rounded once. FP8 results are quantised from the fp32 row.
"""

# Kernels carry no annotations, since Triton gives their arguments their types.

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from rankonce.kernels.fp8_linear.reference import QuantizedRows
from rankonce.kernels.fp8_linear.triton import magnitudes, row_scales, row_tile
from rankonce.kernels.fused_norm.reference import Activation
from rankonce.kernels.variants import Variant


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise ROWS rows of x, or of x + residual, which goes to ``sum_ptr``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)
    out_offsets = rows[:, None] * WIDTH + columns
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    rounded = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=mask, other=0.0)
    x = rounded.to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += rows[:, None] * residual_stride
        x += tl.load(residual_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        # The norm is that of the sum as the next layer will read it.
        rounded = x.to(rounded.dtype)
        tl.store(sum_ptr + out_offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    normed = x * inverse_rms[:, None] * (weight + offset)
    if scale_ptr is not None:
        scale, inverse = row_scales(tl.max(magnitudes(normed), axis=1))
        normed = normed * inverse[:, None]
        tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    tl.store(out_ptr + out_offsets, normed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    first_row,
    num_tokens,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise and rotate ROWS heads, token after token; tiles hold one half of every head."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_tokens * NUM_HEADS) & (columns < HALF)
    tokens = (rows // NUM_HEADS).to(tl.int64)
    heads = (rows % NUM_HEADS).to(tl.int64)
    x_ptr += tokens * token_stride + heads * head_stride + columns
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        sum_squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        inverse_rms = tl.rsqrt(sum_squares / (2 * HALF) + eps)[:, None]
        # Every row loads the weight, from L1, in the tile's own layout: no exchange between lanes.
        weight_ptr += rows * 0 + columns
        weight = tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
        first = first * inverse_rms * (weight + offset)
        weight = tl.load(weight_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
        second = second * inverse_rms * (weight + offset)
    cos_ptr += tokens * cos_stride + columns
    sin_ptr += tokens * sin_stride + columns
    out_ptr += rows.to(tl.int64) * (2 * HALF) + columns
    cos = tl.load(cos_ptr, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr, mask=mask, other=0.0).to(tl.float32)
    turned = first * cos - second * sin
    tl.store(out_ptr, turned.to(out_ptr.dtype.element_ty), mask=mask)
    cos = tl.load(cos_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    turned = second * cos + first * sin
    tl.store(out_ptr + HALF, turned.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def norm_rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    eps,
    offset,
    NUM_Q_HEADS: tl.constexpr,
    NUM_K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise and rotate a tile of queries; the programs after those take the keys."""
    tile = tl.program_id(0)
    num_q_tiles = tl.cdiv(num_tokens * NUM_Q_HEADS, ROWS)
    if tile < num_q_tiles:
        _rotate(
            q_ptr,
            q_out_ptr,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            tile * ROWS,
            num_tokens,
            q_stride,
            q_head_stride,
            cos_stride,
            sin_stride,
            eps,
            offset,
            NUM_Q_HEADS,
            HALF,
            COLUMNS,
            ROWS,
        )
    else:
        _rotate(
            k_ptr,
            k_out_ptr,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            (tile - num_q_tiles) * ROWS,
            num_tokens,
            k_stride,
            k_head_stride,
            cos_stride,
            sin_stride,
            eps,
            offset,
            NUM_K_HEADS,
            HALF,
            COLUMNS,
            ROWS,
        )


@triton.jit
def _gated(gate_ptr, up_ptr, mask, GELU: tl.constexpr):
    """act(gate) * up in fp32; silu(g) = g sigmoid(g), and tanh's gelu = g sigmoid(2 z)."""
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # 2 sqrt(2 / pi) (g + 0.044715 g^3)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-inner)) * up


@triton.jit(do_not_specialize=["num_rows"])
def gated_activation_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    num_rows,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    GELU: tl.constexpr,
):
    """Activate and multiply a tile of ROWS x COLUMNS."""
    rows = tl.program_id(0).to(tl.int64)[None, None] * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    out = _gated(
        gate_ptr + rows * gate_stride + columns, up_ptr + rows * up_stride + columns, mask, GELU
    )
    tl.store(out_ptr + rows * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gated_activation_quantize_kernel(
    gate_ptr,
    up_ptr,
    values_ptr,
    scale_ptr,
    num_rows,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    GELU: tl.constexpr,
):
    """Activate, multiply and quantise ROWS rows; COLUMNS below WIDTH: in two sweeps."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    real = (rows < num_rows)[:, None]
    gate_ptr += rows[:, None] * gate_stride + columns
    up_ptr += rows[:, None] * up_stride + columns
    values_ptr += rows[:, None] * WIDTH + columns
    if COLUMNS >= WIDTH:
        mask = real & (columns < WIDTH)
        out = _gated(gate_ptr, up_ptr, mask, GELU)
        scale, inverse = row_scales(tl.max(magnitudes(out), axis=1))
        tl.store(values_ptr, (out * inverse[:, None]).to(tl.float8e4nv), mask=mask)
    else:
        peaks = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for start in range(0, WIDTH, COLUMNS):
            mask = real & (start + columns < WIDTH)
            out = _gated(gate_ptr + start, up_ptr + start, mask, GELU)
            peaks = tl.maximum(peaks, magnitudes(out))
        scale, inverse = row_scales(tl.max(peaks, axis=1))
        for start in range(0, WIDTH, COLUMNS):
            mask = real & (start + columns < WIDTH)
            out = _gated(gate_ptr + start, up_ptr + start, mask, GELU)
            values = (out * inverse[:, None]).to(tl.float8e4nv)
            tl.store(values_ptr + start, values, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


def rms_norm_config(width: int) -> dict[str, Any]:
    """Return the kernel's constants and launch options for at most MAX_COLUMNS columns."""
    return {"WIDTH": width, **row_tile(width)}


def norm_rope_config(num_q_heads: int, num_k_heads: int, head_size: int) -> dict[str, Any]:
    """Return the kernel's constants and launch options.

    Heads are independent: 4096 values a program, whatever the number of heads, 32 a lane.
    """
    columns = triton.next_power_of_2(head_size // 2)
    return {
        "NUM_Q_HEADS": num_q_heads,
        "NUM_K_HEADS": num_k_heads,
        "HALF": head_size // 2,
        "COLUMNS": columns,
        "ROWS": max(2048 // columns, 1),
        "num_warps": 4,
        "num_stages": 1,
    }


def gated_activation_config(width: int, activation: Activation) -> dict[str, Any]:
    """Return the kernel's constants and launch options.

    Elements are independent: 2048 a program, two loads of 16 bytes a lane from each input, in
    columns of 1024 since MLP widths are multiples of it, so that few lanes stand idle.
    """
    columns = min(triton.next_power_of_2(width), 1024)
    return {
        "WIDTH": width,
        "COLUMNS": columns,
        "ROWS": 2048 // columns,
        "GELU": activation == "gelu_tanh",
        "num_warps": 4,
        "num_stages": 1,
    }


def gated_activation_quantize_config(width: int, activation: Activation) -> dict[str, Any]:
    """Return the kernel's constants and launch options: a program needs the row's maximum."""
    return {"WIDTH": width, **row_tile(width), "GELU": activation == "gelu_tanh"}


def rms_norm_triton(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    offset: float,
    residual_TD: Tensor | None,
    quantize: bool,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Normalise rows of at most MAX_COLUMNS columns; arguments as in ``rms_norm``."""
    num_rows, width = x_TD.shape
    out_TD, scale_T = _empty_rows(x_TD, quantize)
    sum_TD = x_TD if residual_TD is None else _empty_rows(x_TD, False)[0]
    config = rms_norm_config(width)
    if num_rows:
        with torch.cuda.device_of(x_TD):
            rms_norm_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
                x_TD,
                residual_TD,
                weight_D.contiguous(),
                None if residual_TD is None else sum_TD,
                out_TD,
                scale_T,
                num_rows,
                x_TD.stride(0),
                0 if residual_TD is None else residual_TD.stride(0),
                eps,
                offset,
                **config,
            )
    return _rows(out_TD, scale_T), sum_TD


def norm_rope_triton(
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
    """Normalise and rotate in one launch; arguments as in ``norm_rope``."""
    num_tokens, num_q_heads, head_size = q_THK.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THK, k_TGK))
    num_k_heads = k_TGK.shape[1]
    config = norm_rope_config(num_q_heads, num_k_heads, head_size)
    num_tiles = sum(
        triton.cdiv(num_tokens * heads, config["ROWS"]) for heads in (num_q_heads, num_k_heads)
    )
    if num_tiles:
        with torch.cuda.device_of(q_THK):
            norm_rope_kernel[(num_tiles,)](
                q_THK,
                k_TGK,
                cos_TK,
                sin_TK,
                None if q_weight_K is None else q_weight_K.contiguous(),
                None if k_weight_K is None else k_weight_K.contiguous(),
                q_out,
                k_out,
                num_tokens,
                q_THK.stride(0),
                q_THK.stride(1),
                k_TGK.stride(0),
                k_TGK.stride(1),
                cos_TK.stride(0),
                sin_TK.stride(0),
                eps,
                offset,
                **config,
            )
    return q_out, k_out


def gated_activation_triton(
    gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, quantize: bool
) -> Tensor | QuantizedRows:
    """Activate and multiply; arguments as in ``gated_activation``."""
    num_rows, width = gate_TI.shape
    out_TI, scale_T = _empty_rows(gate_TI, quantize)
    strides = (gate_TI.stride(0), up_TI.stride(0))
    if num_rows:
        with torch.cuda.device_of(gate_TI):
            if scale_T is None:
                config = gated_activation_config(width, activation)
                grid = (
                    triton.cdiv(num_rows, config["ROWS"]),
                    triton.cdiv(width, config["COLUMNS"]),
                )
                gated_activation_kernel[grid](gate_TI, up_TI, out_TI, num_rows, *strides, **config)
            else:
                config = gated_activation_quantize_config(width, activation)
                gated_activation_quantize_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
                    gate_TI, up_TI, out_TI, scale_T, num_rows, *strides, **config
                )
    return _rows(out_TI, scale_T)


def _empty_rows(x_TD: Tensor, quantize: bool) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float8_e4m3fn if quantize else x_TD.dtype
    scale_T = torch.empty(x_TD.shape[0], device=x_TD.device) if quantize else None
    return torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device), scale_T


def _rows(values_TD: Tensor, scale_T: Tensor | None) -> Tensor | QuantizedRows:
    return values_TD if scale_T is None else QuantizedRows(values_TD=values_TD, scale_T=scale_T)


def machine_code_variants() -> list[Variant]:
    """Sizes of Qwen3-0.6B and Llama-3.1-8B, with and without FP8, and a row of two sweeps."""
    fp8: dict[str, Any] = {"min_capability": 89, "expects": (_WIDE_LOAD, _TO_FP8)}
    plain: dict[str, Any] = {"expects": (_WIDE_LOAD,)}
    variants = []
    for width in (1024, 4096):
        for residual in (False, True):
            for quantize in (False, True):
                variants.append(
                    _variant(
                        f"rms_norm{'-residual' * residual}{'-fp8' * quantize}-bf16-{width}",
                        rms_norm_kernel,
                        rms_norm_config(width),
                        {
                            "x_ptr": "*bf16",
                            "residual_ptr": "*bf16" if residual else None,
                            "weight_ptr": "*bf16",
                            "sum_ptr": "*bf16" if residual else None,
                            "out_ptr": "*fp8e4nv" if quantize else "*bf16",
                            "scale_ptr": "*fp32" if quantize else None,
                            "num_rows": "i32",
                            "x_stride": "i64",
                            "residual_stride": "i64",
                            "eps": "fp32",
                            "offset": "fp32",
                        },
                        **(fp8 if quantize else plain),
                    )
                )
    for num_q_heads, num_k_heads, head_size, weight in (
        (16, 8, 128, "*bf16"),
        (32, 8, 128, None),
        (32, 8, 64, None),
    ):
        variants.append(
            _variant(
                f"norm_rope{'-norm' * (weight is not None)}-bf16-{num_q_heads}x{head_size}",
                norm_rope_kernel,
                norm_rope_config(num_q_heads, num_k_heads, head_size),
                {
                    **dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr"), "*bf16"),
                    **dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), weight),
                    **dict.fromkeys(("q_out_ptr", "k_out_ptr"), "*bf16"),
                    "num_tokens": "i32",
                    **dict.fromkeys(("q_stride", "q_head_stride"), "i64"),
                    **dict.fromkeys(("k_stride", "k_head_stride"), "i64"),
                    **dict.fromkeys(("cos_stride", "sin_stride"), "i64"),
                    **dict.fromkeys(("eps", "offset"), "fp32"),
                },
                **plain,
            )
        )
    sizes = {"num_rows": "i32", "gate_stride": "i64", "up_stride": "i64"}
    inputs = {"gate_ptr": "*bf16", "up_ptr": "*bf16"}
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for activation in activations:
        for width in (3072, 14336):
            variants.append(
                _variant(
                    f"gated_activation-{activation}-bf16-{width}",
                    gated_activation_kernel,
                    gated_activation_config(width, activation),
                    {**inputs, "out_ptr": "*bf16", **sizes},
                    **plain,
                )
            )
        for width in (3072, 14336, 28672):
            variants.append(
                _variant(
                    f"gated_activation-{activation}-fp8-bf16-{width}",
                    gated_activation_quantize_kernel,
                    gated_activation_quantize_config(width, activation),
                    {**inputs, "values_ptr": "*fp8e4nv", "scale_ptr": "*fp32", **sizes},
                    **fp8,
                )
            )
    return variants


_WIDE_LOAD = "ld.global.v4.b32"
_TO_FP8 = "cvt.rn.satfinite.e4m3x2"


def _variant(
    name: str,
    kernel: Any,
    config: dict[str, Any],
    types: dict[str, str | None],
    **rest: Any,
) -> Variant:
    absent = {argument: None for argument, kind in types.items() if kind is None}
    return Variant(
        name=name,
        kernel=kernel,
        signature={argument: kind for argument, kind in types.items() if kind is not None},
        num_warps=config.pop("num_warps"),
        num_stages=config.pop("num_stages"),
        constexprs={**absent, **config},
        **rest,
    )
