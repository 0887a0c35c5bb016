"""The precisions that a model can run in.

The head is always computed in FP32, and embeddings and norms are never quantised. FP8 quantises
the linear layers of a known architecture when it is loaded; 8-bit and 4-bit weights are those of
bitsandbytes and work for every architecture. Experts that share one tensor are no linear layers
and stay as they are.
"""

import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from rankonce.errors import MissingDependencyError, ModelError

# What bitsandbytes logs as warnings for every product and when it is imported on some CPUs.
_NOISY_LOGGERS = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How weights are held and multiplied.

    Attributes:
        dtype: of what is not quantised; None takes the device's usual one.
        fp8: linear layers in FP8.
        bits: of the weights of linear layers, by bitsandbytes.
    """

    dtype: torch.dtype | None = None
    fp8: bool = False
    bits: int | None = None

    def dtype_on(self, device: str) -> torch.dtype:
        """Return the dtype; a CPU computes 16-bit numbers slower than 32-bit ones."""
        return self.dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


PRECISIONS = {
    "fp32": Precision(dtype=torch.float32),
    "bf16": Precision(dtype=torch.bfloat16),
    "fp16": Precision(dtype=torch.float16),
    "fp8": Precision(fp8=True),
    "int8": Precision(bits=8),
    "nf4": Precision(bits=4),
}


def find_precision(name: str | None, device: str) -> Precision:
    """Return a precision by its name.

    Args:
        name: of ``PRECISIONS``; None is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ModelError: there is none of this name.
    """
    name = name or ("fp32" if device == "cpu" else "bf16")
    if name not in PRECISIONS:
        raise ModelError(f"precision: should be one of {', '.join(PRECISIONS)}, is {name!r}")
    return PRECISIONS[name]


def loading_options(precision: Precision, device: str) -> dict[str, Any]:
    """Return the keyword arguments of ``from_pretrained`` that belong to a precision.

    Raises:
        MissingDependencyError: int8 and nf4 need bitsandbytes and accelerate.
    """
    dtype = precision.dtype_on(device)
    if precision.bits is None:
        return {"dtype": dtype}
    for library in ("bitsandbytes", "accelerate"):
        if find_spec(library) is None:
            raise MissingDependencyError(library, extra="quantize")
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    # Without the threshold's outlier columns, which are found over all rows of a pass: a
    # candidate's score would depend on the others.
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if precision.bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    )
    return {"dtype": dtype, "quantization_config": config, "device_map": {"": device}}


def settle_4bit_layers(network: nn.Module) -> None:
    """Make 4-bit layers on a CPU compute what they hold, in the dtype that was asked for.

    On CPUs with bf16 instructions bitsandbytes multiplies in bf16 whatever was asked for, and the
    scores of a pass differ from separate ones by more than fp32 allows.

    Raises:
        ModelError: the block size does not divide a layer's inputs; bitsandbytes would unpack its
            weights to wrong numbers on a CPU.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in network.named_modules():
        weight: Any = layer.weight if isinstance(layer, Linear4bit) else None
        if weight is None or weight.device.type != "cpu":
            continue
        blocksize = weight.quant_state.blocksize
        if layer.in_features % blocksize:
            raise ModelError(
                f"precision: nf4 on a CPU takes layers of a multiple of {blocksize} inputs; "
                f"{name} has {layer.in_features}, use int8"
            )
        layer.support_avx512bf16_for_cpu = False


def import_bitsandbytes() -> None:
    """Import it in silence and without a network.

    On CPUs with bf16 instructions its import would download and run a kernel of the hub, where the
    package ``kernels`` is installed.
    """
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "bitsandbytes" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    kernels = modules.get("kernels")
    modules["kernels"] = None
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del modules["kernels"]
        if kernels is not None:
            modules["kernels"] = kernels
