"""Merge an adapter into its backbone: an ordinary checkpoint comes out."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rankonce.errors import ModelError
from rankonce.model.adapters import (
    AdapterFiles,
    adapted_layers,
    check_base,
    fingerprint_base,
    load_adapter,
    read_adapter,
)
from rankonce.model.loading import load_model
from rankonce.training.checkpoint import save_model, trained_tasks, write_run_record

# What a merged checkpoint can be saved in; the sum is made in FP32 all the same.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_adapter(base: str, adapter: Path, out: Path, *, dtype: str | None = None) -> str:
    """Write the checkpoint in which a backbone and an adapter are one.

    Weights are added in FP32, whatever the adapter was trained over: codes of 4 or 8 bits cannot
    take up what an adapter adds. So the backbone is its float checkpoint, for QLoRA as well.

    Args:
        base: folder or id of the float checkpoint.
        adapter: folder of the adapter.
        out: folder of the merged checkpoint, new or empty.
        dtype: a name of ``DTYPES`` to save in; the backbone's own by default.

    Returns:
        The name of the dtype that it was saved in.

    Raises:
        ModelError: the adapter does not belong to the backbone, the backbone is no float
            checkpoint, or ``out`` holds something else.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: should be one of {', '.join(DTYPES)}, is {dtype!r}")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"out: {out} holds files already; choose a new folder")
    files = read_adapter(adapter, name="merged")
    # Loading checks the backbone as every command does.
    model = load_model(base, device="cpu", precision="fp32")
    network, fingerprint = model.network, fingerprint_base(base)
    if getattr(network.config, "quantization_config", None) is not None:
        raise ModelError(
            f"model: {base} holds quantised weights, in whose steps an adapter is lost; should be "
            "the float checkpoint"
        )
    check_base(files, base, fingerprint)
    model.acceleration.undo()
    load_adapter(network, files)
    _unload(network, files)
    own = AutoConfig.from_pretrained(base).dtype
    name = dtype or next((key for key, value in DTYPES.items() if value == own), "fp32")
    save_model(out, network.to(DTYPES[name]), model.tokenizer)
    write_run_record(
        out,
        {
            "run": "merge",
            "model": base,
            "base": fingerprint,
            "adapter": str(adapter),
            "dtype": name,
            "tasks": sorted(files.tasks),
            "earlier_tasks": list(trained_tasks(Path(base)) or ()),
        },
    )
    return name


def _unload(network: Any, files: AdapterFiles) -> None:
    """Add an adapter to the weights under it and put these in its place."""
    layers = adapted_layers(network)
    for path, module in list(network.named_modules()):
        if any(module is layer for layer in layers):
            # Refuses sums that are not finite.
            module.merge(safe_merge=True)
            network.set_submodule(path, module.get_base_layer())
    network.delete_adapter(files.key)
