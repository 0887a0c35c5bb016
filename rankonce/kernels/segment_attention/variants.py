"""The variants of the attention kernels that are compiled ahead of time."""

from typing import Any

import torch
import triton

from rankonce.kernels.segment_attention.tiles import TILE_FIELDS
from rankonce.kernels.segment_attention.triton import (
    TileConfig,
    backward_config,
    forward_config,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from rankonce.kernels.variants import Variant


def machine_code_variants() -> list[Variant]:
    """Qwen3-0.6B's heads, other head sizes, and what training and Gemma 2 add."""
    variants = []
    for oldest, newest in ((80, 89), (90, 1000)):
        for head_size in (64, 96, 128, 256):
            variants.append(_forward_variant(head_size, oldest, newest))
            for kernel in (query_gradient_kernel, key_gradient_kernel):
                variants.append(_backward_variant(kernel, head_size, oldest, newest))
        variants.append(_forward_variant(128, oldest, newest, lse=True))
        variants.append(_forward_variant(256, oldest, newest, softcap=True))
        for head_size in (64, 128):
            variants.append(_forward_variant(head_size, oldest, newest, dtype="fp32"))
    return variants


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _shape_of(kernel: Any, config: TileConfig, head_size: int, softcap: bool) -> dict[str, Any]:
    values = {
        "GROUPS": 8,
        "HEADS": 2,
        "HEAD_SIZE": head_size,
        "PADDED_SIZE": triton.next_power_of_2(head_size),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "EDGE": config.edge,
        "TILE_FIELDS": TILE_FIELDS,
        "HAS_SOFTCAP": softcap,
    }
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def _signature_of(kernel: Any, constexprs: dict[str, Any], dtype: str) -> dict[str, str]:
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in ("lse_ptr", "delta_ptr"):
            signature[name] = "*fp32"
        elif name in ("seen_ptr", "tiles_ptr", "runs_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i64" if "stride" in name else "fp32"
    return signature


def _forward_variant(
    head_size: int,
    oldest: int,
    newest: int,
    *,
    dtype: str = "bf16",
    lse: bool = False,
    softcap: bool = False,
) -> Variant:
    config = forward_config(head_size, _DTYPES[dtype], oldest)
    constexprs = _shape_of(forward_kernel, config, head_size, softcap) | {
        "STORE_LSE": lse,
        "COPY_ENGINE": config.copy_engine,
    }
    if not config.copy_engine:
        constexprs |= {"k_desc": None, "v_desc": None}
    signature = _signature_of(forward_kernel, constexprs, dtype)
    if config.copy_engine:
        block = f"tensordesc<{dtype}[1,{config.keys},{constexprs['PADDED_SIZE']}]>"
        signature |= {"k_desc": block, "v_desc": block}
    return Variant(
        name=f"segment_attention{'-lse' * lse}{'-softcap' * softcap}-{dtype}-{head_size}",
        kernel=forward_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_capability=oldest,
        max_capability=newest,
        expects=("wgmma.mma_async", "cp.async.bulk.tensor") if config.copy_engine else (),
    )


def _backward_variant(kernel: Any, head_size: int, oldest: int, newest: int) -> Variant:
    config = backward_config(head_size, torch.bfloat16, oldest)
    constexprs = _shape_of(kernel, config, head_size, softcap=False)
    which = "dq" if kernel is query_gradient_kernel else "dkv"
    return Variant(
        name=f"segment_attention-{which}-bf16-{head_size}",
        kernel=kernel,
        signature=_signature_of(kernel, constexprs, "bf16"),
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_capability=oldest,
        max_capability=newest,
        # Tiles of 32 rows, which head size 256 needs, are below what wgmma takes.
        expects=("wgmma.mma_async",) if oldest >= 90 and config.rows >= 64 else (),
    )
