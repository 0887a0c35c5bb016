"""An operation beside attention, and how its arms call it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankonce.benchmarks.runner import UnavailableError

Call = Callable[[], Any]
# From the inputs to the call that is timed; what it does before is not timed.
Maker = Callable[..., Call]
EAGER = "PyTorch eager"
REFERENCE = "reference"
# Compared with the dense ceiling, whatever its operation is compared with.
DENSE_LINEAR = "bf16 linear"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A kernel on one workload.

    Attributes:
        inputs: draws what all makers take.
        makers: for each arm; the first one gives what the others should equal.
        tolerance: of the relative difference of the whole output.
    """

    name: str
    subject: str
    inputs: Callable[[], tuple[Any, ...]]
    makers: dict[str, Maker]
    flop: float | None = None
    num_bytes: float | None = None
    ceiling: str = "copy_tb_s"
    tolerance: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class ScaledRows:
    """Rows in FP8 and their scales."""

    values: Tensor
    scales: Tensor


def plain(output: Any) -> Tensor:
    """Return an output's values as one tensor: the first of several, FP8 rows rescaled."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return plain(output[0])
    assert is_dataclass(output), type(output)
    tensors = [value for value in vars(output).values() if isinstance(value, Tensor)]
    values, scales = sorted(tensors, key=lambda tensor: tensor.element_size())[:2]
    return values.float() * scales.float().reshape(-1, 1)


def eager(function: Callable[..., Any]) -> Maker:
    """Call a function as it is."""
    return lambda *tensors: partial(function, *tensors)


def compiled(function: Callable[..., Any]) -> Maker:
    """Call a function through torch.compile, on a GPU."""

    def make(*tensors: Any) -> Call:
        if not tensors[0].is_cuda:
            raise UnavailableError("compiled on a GPU only")
        torch._dynamo.reset()
        return partial(torch.compile(function, dynamic=False), *tensors)

    return make


def kernel(module: str, name: str, **options: Any) -> Maker:
    """Call a function of our kernels; its absence is recorded and no fault."""

    def make(*tensors: Any, **named: Any) -> Call:
        try:
            function = getattr(importlib.import_module(f"rankonce.kernels.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"rankonce.kernels.{module}.{name} does not exist") from error
        return partial(function, *tensors, **named, **options)

    return make
