"""Norms, rotary positions and gated activations beside their peers: work of memory bandwidth."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankonce.benchmarks import peers
from rankonce.benchmarks.attention import OURS
from rankonce.benchmarks.operations import (
    EAGER,
    REFERENCE,
    Call,
    Maker,
    Operation,
    ScaledRows,
    compiled,
    eager,
    kernel,
)
from rankonce.benchmarks.timing import quantize_rowwise
from rankonce.benchmarks.workloads import ModelShape

_EPS = 1e-6


def _scaled(maker: Maker) -> Maker:
    """Name the first two outputs of a call rows and scales."""

    def make(*tensors: Any) -> Call:
        call = maker(*tensors)

        def scaled() -> ScaledRows:
            values, scales, *_ = call()
            return ScaledRows(values=values, scales=scales)

        return scaled

    return make


def _liger(name: str, *order: int, **options: Any) -> Maker:
    """Call a function of Liger with the inputs in its own order."""

    def make(*tensors: Any) -> Call:
        function = peers.liger(name)
        return partial(function, *(tensors[place] for place in order), **options)

    return make


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return peers.eager_rms_norm(x, weight, _EPS)


def _added_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return peers.eager_rms_norm(total, weight, _EPS), total


def _added_norm_fp8(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, total = _added_norm(x, weight, residual)
    return (*quantize_rowwise(out), total)


def _gated_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rowwise(peers.eager_gated_activation(gate, up))


def _rope(*tensors: Any) -> tuple[Tensor, ...]:
    return peers.eager_norm_rope(*tensors, eps=_EPS)


def norm_operations(
    model: ModelShape, tokens: int, *, device: str, dtype: torch.dtype
) -> list[Operation]:
    """RMSNorm alone, with a residual and with FP8."""
    width, size = model.hidden_size, dtype.itemsize
    draw = partial(torch.randn, device=device, dtype=dtype)
    subject = f"{model.name} D={width}"

    def ours(module: str, name: str, *, fp8: bool) -> Maker:
        call = kernel(module, name, eps=_EPS, offset=0.0, quantize=fp8)
        return lambda x, weight, residual=None: call(x, weight, residual_TD=residual)

    fused = partial(ours, "fused_norm", "rms_norm")
    reference = partial(ours, "fused_norm.reference", "rms_norm_reference")

    def added() -> tuple[Tensor, ...]:
        return draw(tokens, width), draw(width), draw(tokens, width)

    return [
        Operation(
            name="rms_norm",
            subject=subject,
            inputs=lambda: (draw(tokens, width), draw(width)),
            makers={
                EAGER: eager(_norm),
                OURS: fused(fp8=False),
                REFERENCE: reference(fp8=False),
                "torch.compile": compiled(_norm),
                "F.rms_norm": eager(lambda x, w: F.rms_norm(x, (width,), w, _EPS)),
                "Liger": _liger("liger_rms_norm", 0, 1, eps=_EPS, in_place=False),
            },
            num_bytes=2.0 * tokens * width * size,
        ),
        Operation(
            name="rms_norm + residual",
            subject=subject,
            inputs=added,
            makers={
                EAGER: eager(_added_norm),
                OURS: fused(fp8=False),
                REFERENCE: reference(fp8=False),
                "torch.compile": compiled(_added_norm),
                "Liger": _liger("liger_fused_add_rms_norm", 0, 2, 1, eps=_EPS),
            },
            num_bytes=4.0 * tokens * width * size,
        ),
        Operation(
            name="rms_norm + residual + FP8",
            subject=subject,
            inputs=added,
            makers={
                EAGER: _scaled(eager(_added_norm_fp8)),
                OURS: fused(fp8=True),
                REFERENCE: reference(fp8=True),
                "torch.compile": _scaled(compiled(_added_norm_fp8)),
            },
            num_bytes=tokens * (width * (3.0 * size + 1) + 4),
            tolerance=5e-2,
        ),
    ]


def layer_operations(
    model: ModelShape, tokens: int, *, device: str, dtype: torch.dtype
) -> list[Operation]:
    """RoPE with the norms of queries and keys, and the gated activation."""
    heads, mlp, size = model.heads, model.intermediate_size, dtype.itemsize
    draw = partial(torch.randn, device=device, dtype=dtype)
    has_norms = model.architecture == "qwen3"

    def for_rope() -> tuple[Any, ...]:
        angles = torch.rand(tokens, heads.size // 2, device=device) * 6.28
        angles = torch.cat((angles, angles), dim=-1)
        weights = (draw(heads.size), draw(heads.size)) if has_norms else (None, None)
        q, k = draw(tokens, heads.queries, heads.size), draw(tokens, heads.groups, heads.size)
        return (q, k, angles.cos().to(dtype), angles.sin().to(dtype), *weights)

    def ours(module: str, name: str) -> Maker:
        call = kernel(module, name, eps=_EPS, offset=0.0)
        return lambda q, k, cos, sin, a, b: call(q, k, cos, sin, q_weight_K=a, k_weight_K=b)

    gated = partial(kernel, "fused_norm", "gated_activation", activation="silu")
    gated_reference = partial(
        kernel, "fused_norm.reference", "gated_activation_reference", activation="silu"
    )
    rotated = (heads.queries + heads.groups) * heads.size
    gate_subject = f"{model.name} I={mlp}"
    return [
        Operation(
            name="norm + RoPE" if has_norms else "RoPE",
            subject=f"{model.name} {heads.name}",
            inputs=for_rope,
            makers={
                EAGER: eager(_rope),
                OURS: ours("fused_norm", "norm_rope"),
                REFERENCE: ours("fused_norm.reference", "norm_rope_reference"),
                "torch.compile": compiled(_rope),
            },
            num_bytes=2.0 * tokens * (rotated + heads.size) * size,
        ),
        Operation(
            name="SwiGLU",
            subject=gate_subject,
            inputs=lambda: (draw(tokens, mlp), draw(tokens, mlp)),
            makers={
                EAGER: eager(peers.eager_gated_activation),
                OURS: gated(),
                REFERENCE: gated_reference(quantize=False),
                "torch.compile": compiled(peers.eager_gated_activation),
                "Liger": _liger("liger_swiglu", 0, 1),
            },
            num_bytes=3.0 * tokens * mlp * size,
        ),
        Operation(
            name="SwiGLU + FP8",
            subject=gate_subject,
            inputs=lambda: (draw(tokens, mlp), draw(tokens, mlp)),
            makers={
                EAGER: _scaled(eager(_gated_fp8)),
                OURS: gated(quantize=True),
                REFERENCE: gated_reference(quantize=True),
                "torch.compile": _scaled(compiled(_gated_fp8)),
            },
            num_bytes=tokens * (mlp * (2.0 * size + 1) + 4),
            tolerance=5e-2,
        ),
    ]
