"""The precisions that a model can run in.

The head is always computed in FP32, and embeddings and norms are never quantised. FP8 quantises
the linear layers of a known architecture when it is loaded; 8-bit and 4-bit weights are those of
bitsandbytes and work for every architecture.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from rankonce.errors import ModelError


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
        ModelError: bitsandbytes is not installed.
    """
    dtype = precision.dtype_on(device)
    if precision.bits is None:
        return {"dtype": dtype}
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "precision: int8 and nf4 need bitsandbytes; install it with rankonce[quantize]"
        )
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
