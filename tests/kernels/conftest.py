"""Triton kernels without a GPU: they run under Triton's interpreter, corrected where it is wrong.

The interpreter (Triton 3.6) multiplies the bit patterns of bf16 numbers in ``tl.dot`` and truncates
where a GPU rounds to the nearest number. Both are put right here; ``test_interpreter.py`` shows
that they were wrong and are right now. With a GPU the same tests run the compiled kernels.
"""

from typing import Any

import numpy as np
import pytest
import torch
from triton import language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kept in the interpreter as unsigned integers of the same width.
_NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
}


def _widen(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Return any floating numbers of the interpreter as float32."""
    if dtype not in _NARROW:
        return data.astype(np.float32)
    torch_dtype, bits, unsigned = _NARROW[dtype]
    signed = np.ascontiguousarray(data).view(unsigned).view(np.dtype(str(bits).split(".")[1]))
    return torch.from_numpy(signed).view(torch_dtype).float().numpy()


def _narrow(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Round float32 numbers to the nearest of ``dtype``, as a GPU does."""
    if dtype not in _NARROW:
        return data.astype(interpreter._get_np_dtype(dtype))
    torch_dtype, bits, unsigned = _NARROW[dtype]
    values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    if dtype != tl.bfloat16:  # conversions to FP8 saturate on a GPU
        bound = torch.finfo(torch_dtype).max
        values = values.clamp(-bound, bound)
    return values.to(torch_dtype).view(bits).numpy().view(unsigned)


def _cast(builder: Any, src: Any, dst_type: Any, rounding_mode: Any = None) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _NARROW or (target in _NARROW and source.is_floating()):
        wide = _widen(src.data, source)
        return interpreter.TensorHandle(_narrow(wide, target), target)
    return interpreter.TensorHandle(src.data.astype(interpreter._get_np_dtype(target)), target)


def _dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    product = np.matmul(_widen(a.data, a.dtype.scalar), _widen(b.data, b.dtype.scalar))
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


_bare_dot = interpreter.InterpreterBuilder.create_dot


@pytest.fixture
def bare_dot() -> Any:
    """Return the interpreter's own product."""
    return _bare_dot


@pytest.fixture(scope="session", autouse=True)
def corrected_interpreter() -> Any:
    """Correct the interpreter for every test of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "create_dot", _dot)
        for name in ("cast_impl", "create_fp_to_fp"):
            patch.setattr(builder, name, _cast)
        yield


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU if there is one, else the interpreter on the CPU."""
    return DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU when there is one, so that ``-m gpu`` finds it."""
    for item in items:
        if DEVICE == "cuda" and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
