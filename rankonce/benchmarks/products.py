"""FP8 linear layers and the head beside their peers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rankonce.benchmarks.attention import OURS
from rankonce.benchmarks.operations import (
    DENSE_LINEAR,
    EAGER,
    REFERENCE,
    Call,
    Operation,
    eager,
    kernel,
)
from rankonce.benchmarks.runner import UnavailableError
from rankonce.benchmarks.timing import quantize_rowwise, scaled_mm
from rankonce.benchmarks.workloads import ModelShape

_LABELS = ((1,), (2,))


def _ours_fp8(x: Tensor, weight: Tensor, *, with_quantize: bool) -> Call:
    linear, quantize = kernel("fp8_linear", "fp8_linear"), kernel("fp8_linear", "quantize_rows")
    quantized_weight = quantize(weight)()
    if with_quantize:
        return lambda: linear(quantize(x)(), quantized_weight, out_dtype=x.dtype)()
    return linear(quantize(x)(), quantized_weight, out_dtype=x.dtype)


def _reference_fp8(x: Tensor, weight: Tensor) -> Call:
    linear = kernel("fp8_linear.reference", "fp8_linear_reference", bias_N=None)
    quantize = kernel("fp8_linear.reference", "quantize_rows_reference")
    return linear(quantize(x)(), quantize(weight)(), out_dtype=x.dtype)


def _scaled_mm(x: Tensor, weight: Tensor) -> Call:
    if not x.is_cuda:
        raise UnavailableError("measured on a GPU only")
    return partial(scaled_mm, quantize_rowwise(x), quantize_rowwise(weight))


def linear_operations(
    model: ModelShape, tokens: int, *, device: str, dtype: torch.dtype
) -> list[Operation]:
    """The linear layers in FP8, with the rows' scales ready and not."""

    def inputs(outputs: int, width: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        return x, torch.randn(outputs, width, device=device, dtype=dtype) * width**-0.5

    return [
        Operation(
            name="fp8_linear",
            subject=f"{model.name} {name} {width}→{outputs}",
            inputs=partial(inputs, outputs, width),
            makers={
                DENSE_LINEAR: eager(F.linear),
                OURS: partial(_ours_fp8, with_quantize=False),
                f"{OURS}, rows quantised in the call": partial(_ours_fp8, with_quantize=True),
                "torch._scaled_mm": _scaled_mm,
                REFERENCE: _reference_fp8,
            },
            flop=2.0 * tokens * outputs * width,
            ceiling="fp8_tflops",
            tolerance=8e-2,
        )
        for name, (outputs, width) in model.linear_shapes().items()
    ]


def _whole_vocabulary(hidden: Tensor, weight: Tensor) -> Tensor:
    """All logits at once, rounded to fp32 only: what streaming replaces."""
    if hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden @ weight.T
    return logits.log_softmax(dim=-1)[:, [forms[0] for forms in _LABELS]]


def _among_labels(hidden: Tensor, weight: Tensor) -> Tensor:
    rows = weight[[forms[0] for forms in _LABELS]]
    return (hidden.float() @ rows.float().T).log_softmax(dim=-1)


def _ours_vocabulary(hidden: Tensor, weight: Tensor) -> Call:
    call = kernel("label_logprobs", "vocabulary_logprobs")(hidden, weight, _LABELS)
    return lambda: call().labels_CL


def _reference_head(name: str, hidden: Tensor, weight: Tensor) -> Call:
    forms = kernel("label_logprobs.forms", "place_forms")(_LABELS, hidden.device)()
    return kernel("label_logprobs.reference", name)(hidden, weight, forms, None, None)


def head_operations(
    model: ModelShape, count: int, *, device: str, dtype: torch.dtype
) -> list[Operation]:
    """Log-probabilities of the labels, among themselves and in the whole vocabulary."""
    width, vocabulary = model.hidden_size, model.vocab_size

    def inputs() -> tuple[Tensor, Tensor]:
        hidden = torch.randn(count, width, device=device, dtype=dtype)
        return hidden, torch.randn(vocabulary, width, device=device, dtype=dtype) * 0.02

    subject = f"{model.name} D={width} V={vocabulary}"
    return [
        Operation(
            name="vocabulary_logprobs",
            subject=subject,
            inputs=inputs,
            makers={
                "PyTorch, all logits in fp32": eager(_whole_vocabulary),
                OURS: _ours_vocabulary,
                REFERENCE: partial(_reference_head, "vocabulary_logprobs_reference"),
            },
            flop=2.0 * count * vocabulary * width,
            ceiling="matmul_tflops",
        ),
        Operation(
            name="label_logprobs",
            subject=subject,
            inputs=inputs,
            makers={
                EAGER: eager(_among_labels),
                OURS: lambda h, w: kernel("label_logprobs", "label_logprobs")(h, w, _LABELS),
                REFERENCE: partial(_reference_head, "label_logprobs_reference"),
            },
            num_bytes=float(count * width * dtype.itemsize),
        ),
    ]
