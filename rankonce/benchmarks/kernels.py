"""``python -m rankonce.benchmarks.kernels``: every kernel beside its peers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankonce.benchmarks.attention import attention_cases, tensor_difference, tile_cases
from rankonce.benchmarks.elementwise import layer_operations, norm_operations
from rankonce.benchmarks.operations import DENSE_LINEAR, Operation, plain
from rankonce.benchmarks.products import head_operations, linear_operations
from rankonce.benchmarks.runner import Arm, Case, Measurement
from rankonce.benchmarks.timing import time_call
from rankonce.benchmarks.workloads import (
    HEADS,
    LLAMA_8B,
    MAIN_SHAPE,
    QWEN3_06B,
    SHAPES,
    SMALL_HEADS,
    SMALL_MODELS,
    SMALL_SHAPES,
    ModelShape,
    PassShape,
)


@dataclass(kw_only=True)
class _Inputs:
    tensors: tuple[Any, ...]
    expected: Tensor | None = None


def kernel_cases(*, device: str, dtype: torch.dtype, small: bool) -> list[Case]:
    """List the cases of all kernels."""
    shapes, heads = (SMALL_SHAPES, SMALL_HEADS) if small else (SHAPES, HEADS)
    models = SMALL_MODELS if small else (QWEN3_06B, LLAMA_8B)
    main = SMALL_SHAPES[0] if small else MAIN_SHAPE
    cases = [
        *attention_cases(shapes, heads, device=device, dtype=dtype),
        *operation_cases(models, main, device=device, dtype=dtype),
    ]
    if device.startswith("cuda"):
        cases += tile_cases(shapes[:2], heads[:2], device=device, dtype=dtype)
    return cases


def operation_cases(
    models: Sequence[ModelShape], shape: PassShape, *, device: str, dtype: torch.dtype
) -> list[Case]:
    """List the cases of the operations beside attention, on the rows of one pass."""
    cases = []
    for model in models:
        operations = [
            *norm_operations(model, shape.num_tokens, device=device, dtype=dtype),
            *layer_operations(model, shape.num_tokens, device=device, dtype=dtype),
            *linear_operations(model, shape.num_tokens, device=device, dtype=dtype),
            *head_operations(model, shape.num_candidates, device=device, dtype=dtype),
        ]
        for operation in operations:
            arms = tuple(
                Arm(
                    name=name,
                    measure=partial(_measure, operation, name, device),
                    expected_s=8.0 if name == "torch.compile" else 4.0,
                )
                for name in operation.makers
            )
            cases.append(
                Case(
                    suite="kernels",
                    operation=operation.name,
                    direction="forward",
                    shape=shape.name,
                    subject=operation.subject,
                    dtype=str(dtype).removeprefix("torch."),
                    priority=40,
                    prepare=partial(_draw, operation),
                    arms=arms,
                )
            )
    return cases


def _draw(operation: Operation) -> _Inputs:
    torch.manual_seed(0)
    return _Inputs(tensors=operation.inputs())


def _measure(operation: Operation, arm: str, device: str, inputs: _Inputs) -> Measurement:
    with torch.no_grad():
        call = operation.makers[arm](*inputs.tensors)
        values = plain(call())
        if inputs.expected is None:
            first = next(iter(operation.makers.values()))
            inputs.expected = plain(first(*inputs.tensors)())
        difference = tensor_difference([values], [inputs.expected], operation.tolerance)
        del values
        timing = None if difference.is_wrong else time_call(call, device, queued=True)
    return Measurement(
        timing=timing,
        difference=difference,
        flop=operation.flop,
        num_bytes=operation.num_bytes,
        ceiling="matmul_tflops" if arm == DENSE_LINEAR else operation.ceiling,
    )


if __name__ == "__main__":
    from rankonce.benchmarks.command import main

    raise SystemExit(main(("kernels",)))
