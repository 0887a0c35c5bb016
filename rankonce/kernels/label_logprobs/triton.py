"""Log-probabilities of score rows on a GPU: FP32 accuracy on tensor cores, no stored logits.

Every row is computed by itself, in an order that depends on D and V only: its result has the same
bits whatever rows stand beside it and however many they are.
"""

# Kernels carry no annotations, since Triton gives their arguments their types.

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from rankonce.kernels.label_logprobs.forms import LabelForms
from rankonce.kernels.variants import Variant

# A launch takes this many rows, so that the partial results of the splits stay below 32 MB.
_ROWS_PER_LAUNCH = 16_384
# At least one program for each multiprocessor of an H200 (132), even for a single block of rows.
_MAX_SPLITS = 256


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How a kernel is built: tile shapes and accuracy, warps, stages of its load pipeline."""

    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def accuracy(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """Choose how products get FP32 accuracy.

    ``exact``: 16-bit operands of one dtype; their products are exact and added up in FP32.
    ``split``: FP32 rows on bf16 weights; a row is the sum of three bf16 terms, so that tensor
    cores multiply exactly. ``ieee``: everything else, FP32 multiply-adds without tensor cores:
    those would need six products for FP32 on FP32 and cut off sums where this rounds them, and
    FP32 weights are for people who check numbers.
    """
    if hidden_dtype == weight_dtype != torch.float32:
        return "exact"
    if hidden_dtype == torch.float32 and weight_dtype == torch.bfloat16:
        return "split"
    return "ieee"


def labels_config(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, *, size: int, num_forms: int
) -> KernelConfig:
    """Tiles of the label kernel, which is bound by reading the rows once."""
    mode = accuracy(hidden_dtype, weight_dtype)
    # tl.dot takes at least 16 columns; all forms stand in one tile, so that rows are read once.
    block_n = max(16, triton.next_power_of_2(num_forms))
    # Long slices of D keep many bytes on their way; ieee holds its operands in registers.
    widest = 32 if mode == "ieee" else 128 if mode == "split" else 256
    block_d = max(16, min(widest, 8192 // block_n, triton.next_power_of_2(size)))
    constexprs = {
        "SIZE": size,
        # 32 rows: four warps of 16 x 8 results; more would leave a GPU idle at 500 candidates.
        "BLOCK_C": 32,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        # 32 partial results of every row at once: eight loads for the longest vocabulary.
        "BLOCK_S": 32,
        "ACCURACY": mode,
    }
    return KernelConfig(constexprs=constexprs, num_warps=4, num_stages=3)


def vocabulary_config(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, *, size: int
) -> KernelConfig:
    """Tiles of the vocabulary kernel, a product whose result is reduced at once."""
    mode = accuracy(hidden_dtype, weight_dtype)
    if mode == "ieee":
        # Each of 256 threads holds 4 x 4 results and its operands, 16 deep, in registers.
        block_c, block_v, block_d = 64, 64, 16
    else:
        # Two warpgroups of 64 x 128 results, as one wgmma gives them. Three stages of 32 kB let
        # two 16-bit programs share a multiprocessor: one multiplies while one exponentiates.
        # Split rows take twice the bytes and two sums, hence half the depth.
        block_c, block_v, block_d = 128, 128, 64 if mode == "exact" else 32
    constexprs = {
        "SIZE": size,
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "ACCURACY": mode,
    }
    return KernelConfig(constexprs=constexprs, num_warps=8, num_stages=3)


def label_logprobs_triton(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Normalise over the labels; their rows of the head are gathered in the kernel.

    Args:
        hidden_CD, weight_VD, bias_V: bf16 | fp16 | fp32, on one GPU.
        forms: at most ``forms.MAX_FORMS`` of them.

    Returns:
        label_logprobs_CL in FP32, without gradients.
    """
    hidden_CD, weight_VD = _with_dense_rows(hidden_CD), _with_dense_rows(weight_VD)
    labels_CL, _ = _run_labels(hidden_CD, weight_VD, forms, bias_V, softcap, None)
    return labels_CL


def vocabulary_logprobs_triton(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Normalise over the vocabulary with an online log-sum-exp (Milakov & Gimelshein 2018).

    The vocabulary is split between programs; each leaves the largest logit it saw and the sum of
    exponentials relative to it, and the label kernel merges them.

    Args:
        hidden_CD, weight_VD, bias_V: bf16 | fp16 | fp32, on one GPU.
        forms: at most ``forms.MAX_FORMS`` of them.

    Returns:
        label_logprobs_CL and the log-sum-exp lse_C of all logits, in FP32, without gradients.
    """
    hidden_CD, weight_VD = _with_dense_rows(hidden_CD), _with_dense_rows(weight_VD)
    parts = []
    for rows_CD in hidden_CD.split(_ROWS_PER_LAUNCH):
        partial = _run_vocabulary(rows_CD, weight_VD, bias_V, softcap)
        parts.append(_run_labels(rows_CD, weight_VD, forms, bias_V, softcap, partial))
    if len(parts) == 1:
        return parts[0]
    labels, sums = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(sums)


def _with_dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _run_labels(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
    partial: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    num_rows, size = hidden_CD.shape
    num_forms = len(forms.ids)
    config = labels_config(hidden_CD.dtype, weight_VD.dtype, size=size, num_forms=num_forms)
    device = hidden_CD.device
    labels_CL = torch.empty(num_rows, forms.num_labels, dtype=torch.float32, device=device)
    lse_C = torch.empty(num_rows, dtype=torch.float32, device=device)
    max_SC, sum_SC = (lse_C, lse_C) if partial is None else partial
    grid = (triton.cdiv(num_rows, config.constexprs["BLOCK_C"]),)
    with torch.cuda.device_of(hidden_CD):
        _labels_kernel[grid](
            hidden_CD,
            weight_VD,
            weight_VD if bias_V is None else bias_V,
            forms.ids_N,
            forms.labels_N,
            max_SC,
            sum_SC,
            labels_CL,
            lse_C,
            num_rows,
            num_forms,
            forms.num_labels,
            0 if partial is None else max_SC.shape[0],
            hidden_CD.stride(0),
            weight_VD.stride(0),
            1.0 if softcap is None else softcap,
            **config.constexprs,
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            WHOLE=partial is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return labels_CL, lse_C


def _run_vocabulary(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    num_rows, size = hidden_CD.shape
    num_tokens = weight_VD.shape[0]
    config = vocabulary_config(hidden_CD.dtype, weight_VD.dtype, size=size)
    num_tiles = triton.cdiv(num_tokens, config.constexprs["BLOCK_V"])
    # Splits depend on V alone: another number of rows must not change the order of the sums.
    tiles_per_split = triton.cdiv(num_tiles, _MAX_SPLITS)
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    device = hidden_CD.device
    max_SC = torch.empty(num_splits, num_rows, dtype=torch.float32, device=device)
    sum_SC = torch.empty(num_splits, num_rows, dtype=torch.float32, device=device)
    # Blocks of rows come first: those that run together then read the same weights from the L2.
    grid = (triton.cdiv(num_rows, config.constexprs["BLOCK_C"]), num_splits)
    with torch.cuda.device_of(hidden_CD):
        _vocabulary_kernel[grid](
            hidden_CD,
            weight_VD,
            weight_VD if bias_V is None else bias_V,
            max_SC,
            sum_SC,
            num_rows,
            num_tokens,
            tiles_per_split,
            hidden_CD.stride(0),
            weight_VD.stride(0),
            1.0 if softcap is None else softcap,
            **config.constexprs,
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return max_SC, sum_SC


@triton.jit
def _add_products(total, rest, hidden_CD, weight_DN, ACCURACY: tl.constexpr):
    if ACCURACY == "exact":
        total = tl.dot(hidden_CD, weight_DN, total)
    elif ACCURACY == "split":
        high = hidden_CD.to(tl.bfloat16)
        left = hidden_CD - high.to(tl.float32)
        middle = left.to(tl.bfloat16)
        low = (left - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(high, weight_DN, total)
        # Small terms have a sum of their own: tensor cores cut off what they add to a large one.
        rest = tl.dot(middle, weight_DN, rest)
        rest = tl.dot(low, weight_DN, rest)
    else:
        total = tl.dot(
            hidden_CD.to(tl.float32), weight_DN.to(tl.float32), total, input_precision="ieee"
        )
    return total, rest


@triton.jit
def _read_logits(
    hidden_ptrs,
    weight_ptrs,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACCURACY: tl.constexpr,
):
    """Multiply rows at C x 1 pointers by columns at 1 x N pointers."""
    total = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    rest = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_D):
        places = start + tl.arange(0, BLOCK_D)
        if SIZE % BLOCK_D == 0:
            hidden_CD = tl.load(hidden_ptrs + places[None, :])
            weight_DN = tl.load(weight_ptrs + places[:, None])
        else:
            hidden_CD = tl.load(hidden_ptrs + places[None, :], places[None, :] < SIZE, other=0.0)
            weight_DN = tl.load(weight_ptrs + places[:, None], places[:, None] < SIZE, other=0.0)
        total, rest = _add_products(total, rest, hidden_CD, weight_DN, ACCURACY)
    if ACCURACY == "split":
        total += rest
    return total


@triton.jit
def _finish_logits(
    logits, bias_ptr, tokens, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    if HAS_BIAS:
        logits += tl.load(bias_ptr + tokens).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    return logits


@triton.jit
def _tanh(x):
    """Hyperbolic tangent to FP32's last bits: the polynomial of Cephes (tanhf) near zero."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _finite(largest):
    """Replace the maximum of nothing, so that ``x - largest`` is -inf there instead of NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=["num_rows"])
def _vocabulary_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    max_ptr,
    sum_ptr,
    num_rows,
    num_tokens,
    tiles_per_split,
    hidden_stride,
    weight_stride,
    softcap,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACCURACY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Reduce the logits of a block of rows over one split of the vocabulary."""
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    # Rows and tokens past the end read the last one, which spares a mask in the loop.
    hidden_ptrs = (
        hidden_ptr + (tl.minimum(rows, num_rows - 1).to(tl.int64) * hidden_stride)[:, None]
    )
    largest = tl.full((BLOCK_C,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = split * tiles_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, num_tokens), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        tokens = tl.minimum(columns, num_tokens - 1).to(tl.int64)
        weight_ptrs = weight_ptr + (tokens * weight_stride)[None, :]
        logits = _read_logits(hidden_ptrs, weight_ptrs, SIZE, BLOCK_C, BLOCK_V, BLOCK_D, ACCURACY)
        logits = _finish_logits(logits, bias_ptr, tokens, softcap, HAS_BIAS, HAS_SOFTCAP)
        logits = tl.where((columns < num_tokens)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        base = _finite(new_largest)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        largest = new_largest
    places = split.to(tl.int64) * num_rows + rows
    tl.store(max_ptr + places, largest, rows < num_rows)
    tl.store(sum_ptr + places, total, rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_forms", "num_labels", "num_splits"])
def _labels_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    labels_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    num_forms,
    num_labels,
    num_splits,
    hidden_stride,
    weight_stride,
    softcap,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACCURACY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Logits of the label forms, summed by label and normalised; merges splits if ``WHOLE``."""
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_rows
    form = tl.arange(0, BLOCK_N)
    in_forms = form < num_forms
    # Forms past the end repeat the first, whose row is at hand.
    form = tl.where(in_forms, form, 0)
    ids = tl.load(ids_ptr + form)
    label_of = tl.load(labels_ptr + form)
    hidden_ptrs = (
        hidden_ptr + (tl.minimum(rows, num_rows - 1).to(tl.int64) * hidden_stride)[:, None]
    )
    weight_ptrs = weight_ptr + (ids * weight_stride)[None, :]
    logits = _read_logits(hidden_ptrs, weight_ptrs, SIZE, BLOCK_C, BLOCK_N, BLOCK_D, ACCURACY)
    logits = _finish_logits(logits, bias_ptr, ids, softcap, HAS_BIAS, HAS_SOFTCAP)
    logits = tl.where(in_forms[None, :], logits, float("-inf"))

    if WHOLE:
        largest = tl.full((BLOCK_C,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for start in range(0, num_splits, BLOCK_S):
            splits = start + tl.arange(0, BLOCK_S)
            places = (
                splits[None, :].to(tl.int64) * num_rows + tl.minimum(rows, num_rows - 1)[:, None]
            )
            present = (splits < num_splits)[None, :]
            split_largest = tl.load(max_ptr + places, present, other=float("-inf"))
            split_total = tl.load(sum_ptr + places, present, other=0.0)
            new_largest = tl.maximum(largest, tl.max(split_largest, 1))
            base = _finite(new_largest)
            shares = split_total * tl.exp(split_largest - base[:, None])
            total = total * tl.exp(largest - base) + tl.sum(shares, 1)
            largest = new_largest
    else:
        largest = tl.max(logits, 1)
        total = tl.sum(tl.exp(logits - _finite(largest)[:, None]), 1)
    base = _finite(largest)
    log_total = tl.log(total)
    tl.store(lse_ptr + rows, base + log_total, in_rows)

    for label in range(0, num_labels):
        own = tl.where((label_of == label)[None, :], logits, float("-inf"))
        own_largest = _finite(tl.max(own, 1))
        own_total = tl.sum(tl.exp(own - own_largest[:, None]), 1)
        # Differences of maxima first: a sum near 18 would lose the last bits of the logarithms.
        logprobs = (own_largest - base) + (tl.log(own_total) - log_total)
        places = rows.to(tl.int64) * num_labels + label
        tl.store(out_ptr + places, logprobs, in_rows)


def machine_code_variants() -> list[Variant]:
    """Specialisations to be compiled ahead of time: every accuracy, plain and with all options."""
    dtypes = {
        "bf16": (torch.bfloat16, torch.bfloat16),
        "fp16": (torch.float16, torch.float16),
        "fp32_bf16": (torch.float32, torch.bfloat16),
        "fp32": (torch.float32, torch.float32),
    }
    return [
        variant
        for name, (hidden_dtype, weight_dtype) in dtypes.items()
        for size, options in ((1024, False), (2560, True))
        for variant in _variants(name, hidden_dtype, weight_dtype, size, options)
    ]


def _variants(
    name: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, size: int, options: bool
) -> list[Variant]:
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    operands = {"hidden_ptr": names[hidden_dtype], "weight_ptr": names[weight_dtype]}
    bias = {"bias_ptr": names[weight_dtype]}
    strides = {"hidden_stride": "i32", "weight_stride": "i32", "softcap": "fp32"}
    given = {"HAS_BIAS": options, "HAS_SOFTCAP": options}
    tensor_cores = accuracy(hidden_dtype, weight_dtype) != "ieee"
    vocabulary = vocabulary_config(hidden_dtype, weight_dtype, size=size)
    labels = labels_config(hidden_dtype, weight_dtype, size=size, num_forms=4)
    suffix = f"{name}_{size}" + ("_bias_softcap" if options else "")
    return [
        Variant(
            name=f"label_logprobs_vocabulary_{suffix}",
            kernel=_vocabulary_kernel,
            signature=operands
            | bias
            | {"max_ptr": "*fp32", "sum_ptr": "*fp32"}
            | dict.fromkeys(("num_rows", "num_tokens", "tiles_per_split"), "i32")
            | strides,
            constexprs=vocabulary.constexprs | given,
            num_warps=vocabulary.num_warps,
            num_stages=vocabulary.num_stages,
            expects=("wgmma",) if tensor_cores else (),
        ),
        Variant(
            name=f"label_logprobs_labels_{suffix}",
            kernel=_labels_kernel,
            signature=operands
            | bias
            | {"ids_ptr": "*i64", "labels_ptr": "*i64"}
            | dict.fromkeys(("max_ptr", "sum_ptr", "out_ptr", "lse_ptr"), "*fp32")
            | dict.fromkeys(("num_rows", "num_forms", "num_labels", "num_splits"), "i32")
            | strides,
            constexprs=labels.constexprs | given | {"WHOLE": options},
            num_warps=labels.num_warps,
            num_stages=labels.num_stages,
            expects=("mma.sync",) if tensor_cores else (),
        ),
    ]
