"""Norm, rotary embedding and activation: as exact as transformers' modules, on both paths."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from rankonce.errors import ShapeError
from rankonce.kernels import fused_norm
from rankonce.kernels.fp8_linear import QuantizedRows, quantize_rows
from rankonce.kernels.fused_norm import gated_activation, norm_rope, reference, rms_norm, triton

EPS = 1e-6
# Added to twice the error of transformers in the same dtype; results are of the order of 1.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
DTYPES = list(TOLERANCES)
SHAPES = [(1, 48), (63, 96), (500, 48), (3, 1024)]
NORMS = [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)]
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
PATHS = [reference, triton]
bare_empty = torch.empty

# The interpreter computes with numpy, which warns of what a GPU does as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory that a kernel forgets to write show."""

    def empty(*args, **kwargs) -> Tensor:
        tensor = bare_empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(params=PATHS, ids=["reference", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send the public functions down one path, on whatever device."""
    chosen = request.param is triton
    monkeypatch.setattr(fused_norm, "runs_triton", lambda x, *, fp8: chosen)
    return request.param


def random_tensors(*shapes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes) + sum(shapes[0]))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Hold the error to twice that of the plain computation in the same dtype."""
    assert actual.shape == exact.shape
    error, plain_error = ((x.double() - exact).abs().max() for x in (actual, plain))
    assert error <= 2 * plain_error + TOLERANCES[actual.dtype]


def assert_quantized(rows: Tensor | QuantizedRows, exact: Tensor) -> None:
    """Hold quantised rows to half a step of FP8."""
    assert isinstance(rows, QuantizedRows)
    torch.testing.assert_close(rows.scale_T, (exact.abs().amax(1) / 448).float(), rtol=1e-5, atol=0)
    bound = torch.maximum(exact.abs() * 2**-4, rows.scale_T[:, None].double() * 2**-10)
    error = (rows.dequantize(torch.float64) - exact).abs()
    assert (error <= bound * (1 + 1e-4) + 1e-6).all()


def share_of_different_bits(a: Tensor | QuantizedRows, b: Tensor | QuantizedRows) -> float:
    assert isinstance(a, QuantizedRows)
    assert isinstance(b, QuantizedRows)
    different = a.values_TD.view(torch.uint8) != b.values_TD.view(torch.uint8)
    return different.float().mean().item()


def exact_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = x.double()
    rms = (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return wide / rms * (weight.double() + offset)


def norm_module(kind: type, weight: Tensor) -> Any:
    module = kind(weight.shape[0], eps=EPS)
    module.weight = torch.nn.Parameter(weight)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "offset"), NORMS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms_are_as_exact_as_those_of_transformers(
    device, path, kind, offset, with_residual, shape, dtype
) -> None:
    x, residual, weight = random_tensors(shape, shape, shape[1:], device=device, dtype=dtype)
    plain_sum = x + residual if with_residual else x
    plain = norm_module(kind, weight)(plain_sum)
    normed, total = rms_norm(
        x, weight, eps=EPS, offset=offset, residual_TD=residual if with_residual else None
    )
    assert torch.equal(total, plain_sum)
    assert normed.dtype == dtype
    exact_sum = x.double() + residual.double() if with_residual else x
    assert_accurate(normed, plain, exact_norm(exact_sum, weight, offset))
    if dtype == torch.float32:
        torch.testing.assert_close(normed, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("width", [48, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_quantised_from_fp32(device, path, width, dtype) -> None:
    x, residual, weight = random_tensors(
        (63, width), (63, width), (width,), device=device, dtype=dtype
    )
    rows, _ = rms_norm(x, weight, eps=EPS, quantize=True)
    assert_quantized(rows, exact_norm(x, weight, 0.0))
    # The norm of the same numbers in fp32 rounds nothing before it is quantised.
    normed, _ = rms_norm(x.float(), weight, eps=EPS)
    assert share_of_different_bits(rows, quantize_rows(normed)) < 1e-3
    rows, total = rms_norm(x, weight, eps=EPS, residual_TD=residual, quantize=True)
    assert torch.equal(total, x + residual)
    assert_quantized(rows, exact_norm(total, weight, 0.0))


def test_norms_of_any_width_agree(device) -> None:
    for width in (1, 7, 4096, 16384):
        x, weight = random_tensors((3, width), (width,), device=device, dtype=torch.float32)
        options = {"eps": EPS, "offset": 0.0, "residual_TD": None, "quantize": False}
        normed, _ = triton.rms_norm_triton(x, weight, **options)
        torch.testing.assert_close(
            normed.double(), exact_norm(x, weight, 0.0), atol=2e-6, rtol=1e-6
        )


def test_weights_may_be_wider_than_the_rows(device, path) -> None:
    x, weight = random_tensors((5, 96), (96,), device=device, dtype=torch.float32)
    normed, _ = rms_norm(x.bfloat16(), weight, eps=EPS)
    expected = exact_norm(x.bfloat16(), weight, 0.0).bfloat16()
    torch.testing.assert_close(normed, expected, atol=0, rtol=2**-7)


def angles(positions: list[int], size: int, *, device: str, dtype: torch.dtype) -> list[Tensor]:
    config = Qwen3Config(head_dim=size, hidden_size=4 * size, num_attention_heads=4)
    rotary = Qwen3RotaryEmbedding(config).to(device)
    tensors = rotary(
        torch.zeros(1, dtype=dtype, device=device), torch.tensor([positions]).to(device)
    )
    return [tensor[0] for tensor in tensors]


def restarting_positions(num_tokens: int) -> list[int]:
    """A prefix of a third, then segments of seven tokens that each start after it."""
    prefix = num_tokens // 3
    return [i if i < prefix else prefix + (i - prefix) % 7 for i in range(num_tokens)]


def plain_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    heads = [
        x if weight is None else norm_module(Qwen3RMSNorm, weight)(x)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    return apply_rotary_pos_emb(*heads, cos, sin, unsqueeze_dim=1)


def exact_norm_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.double() if weight is None else exact_norm(x, weight, 0.0)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return wide * cos.double()[:, None] + turned * sin.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_q_heads", "num_k_heads", "size"),
    [(1, 4, 2, 64), (63, 3, 1, 96), (500, 2, 1, 16), (7, 16, 8, 128)],
)
def test_rotated_heads_are_as_exact_as_those_of_transformers(
    device, path, num_tokens, num_q_heads, num_k_heads, size, with_norm, dtype
) -> None:
    # Views of one fused projection, with the values last.
    (fused, *weights) = random_tensors(
        (num_tokens, num_q_heads + 2 * num_k_heads, size),
        (size,),
        (size,),
        device=device,
        dtype=dtype,
    )
    weights = weights if with_norm else [None, None]
    inputs = fused[:, :num_q_heads], fused[:, num_q_heads : num_q_heads + num_k_heads]
    cos, sin = angles(restarting_positions(num_tokens), size, device=device, dtype=dtype)
    outputs = norm_rope(*inputs, cos, sin, q_weight_K=weights[0], k_weight_K=weights[1], eps=EPS)
    plains = plain_norm_rope(*inputs, cos, sin, weights)
    for x, weight, out, plain in zip(inputs, weights, outputs, plains, strict=True):
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_accurate(out, plain, exact_norm_rope(x, cos, sin, weight))
        if dtype == torch.float32:
            torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-6)


def test_heads_may_lie_in_any_order_and_angles_in_any_dtype(device, path) -> None:
    q, k, weight = random_tensors(
        (4, 9, 32), (2, 9, 32), (32,), device=device, dtype=torch.bfloat16
    )
    cos, sin = angles(list(range(9)), 32, device=device, dtype=torch.float32)
    heads = q.transpose(0, 1), k.transpose(0, 1)
    q_out, k_out = norm_rope(*heads, cos, sin, q_weight_K=weight - 1, eps=EPS, offset=1.0)
    expected = exact_norm_rope(heads[0], cos, sin, (weight - 1).double() + 1)
    torch.testing.assert_close(q_out, expected.bfloat16(), atol=1e-6, rtol=2**-7)
    expected = exact_norm_rope(heads[1], cos, sin, None)
    torch.testing.assert_close(k_out, expected.bfloat16(), atol=1e-6, rtol=2**-7)


def exact_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACT2FN[ACTIVATIONS[activation]](gate.double()) * up.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (63, 96), (500, 48), (5, 3072)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_as_exact_as_those_of_transformers(
    device, path, activation, shape, dtype
) -> None:
    num_rows, width = shape
    # Halves of one tensor, as a fused projection gives them.
    (fused,) = random_tensors((num_rows, 2 * width), device=device, dtype=dtype)
    gate, up = (fused * 3).chunk(2, dim=1)
    out = gated_activation(gate, up, activation=activation)
    assert out.dtype == dtype
    plain = ACT2FN[ACTIVATIONS[activation]](gate) * up
    assert_accurate(out, plain, exact_gated(gate, up, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63, 96), (5, 3072), (2, 20000)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_quantised_from_fp32(device, path, activation, shape, dtype) -> None:
    fused = random_tensors((shape[0], 2 * shape[1]), device=device, dtype=dtype)[0] * 3
    gate, up = fused.chunk(2, dim=1)
    rows = gated_activation(gate, up, activation=activation, quantize=True)
    assert_quantized(rows, exact_gated(gate, up, activation))
    wide = gated_activation(gate.float(), up.float(), activation=activation)
    assert share_of_different_bits(rows, quantize_rows(wide)) < 1e-3


def test_large_gates_stay_finite(device, path) -> None:
    gate = torch.tensor([[-3e4, -100.0, -0.0, 100.0, 3e4]], device=device)
    for activation in ACTIVATIONS:
        out = gated_activation(gate, torch.ones_like(gate), activation=activation)
        torch.testing.assert_close(out, gate.relu())


def test_nan_stays_visible_in_fp8(device, path) -> None:
    x, weight = random_tensors((3, 48), (48,), device=device, dtype=torch.float32)
    x[1, 5] = torch.nan
    for rows in (
        rms_norm(x, weight, eps=EPS, quantize=True)[0],
        gated_activation(x, x, activation="silu", quantize=True),
    ):
        finite = rows.dequantize(torch.float32).isfinite()
        assert not finite[1].any()
        assert finite[[0, 2]].all()


def all_results(x: Tensor, up: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Every operation on rows of 96 columns, row by row comparable."""
    normed, total = rms_norm(x, weight, eps=EPS, residual_TD=up)
    quantized, _ = rms_norm(x, weight, eps=EPS, quantize=True)
    heads = x.view(-1, 3, 32), up.view(-1, 3, 32)
    rotated = norm_rope(*heads, cos, sin, q_weight_K=weight[:32], eps=EPS)
    active = gated_activation(x, up, activation="silu")
    packed = gated_activation(x, up, activation="gelu_tanh", quantize=True)
    fp8 = [t for rows in (quantized, packed) for t in (rows.values_TD.float(), rows.scale_T)]
    return [normed, total, *rotated, active, *fp8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(device, path, dtype) -> None:
    x, up, weight = random_tensors((63, 96), (63, 96), (96,), device=device, dtype=dtype)
    cos, sin = angles(restarting_positions(63), 32, device=device, dtype=dtype)
    together = all_results(x, up, weight, cos, sin)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))[:40].to(device)
    for rows in (order, order[:1]):
        alone = all_results(x[rows], up[rows], weight, cos[rows], sin[rows])
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one, many[rows])


def test_no_rows_give_no_rows(device, path) -> None:
    x = torch.zeros(0, 96, device=device)
    results = all_results(x, x, x.new_ones(96), x[:, :32], x[:, :32])
    assert all(len(result) == 0 for result in results)


def test_row_offsets_pass_two_to_the_31(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "runs_triton", lambda x, *, fp8: True)
    monkeypatch.setattr(torch, "empty", bare_empty)  # memory that nobody touches costs nothing
    x = torch.empty(2**31 + 96, dtype=torch.float16, device=device).as_strided((3, 96), (2**30, 1))
    rows, weight = random_tensors((3, 96), (96,), device=device, dtype=torch.float16)
    x.copy_(rows)
    angle = angles([0, 1, 2], 32, device=device, dtype=torch.float16)
    near = all_results(rows, rows, weight, *angle)
    far = all_results(x, x, weight, *angle)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize(("kind", "offset"), NORMS)
def test_norm_gradients_are_those_of_transformers(device, kind, offset) -> None:
    x, residual, weight, grad, grad_sum = random_tensors(
        (63, 96), (63, 96), (96,), (63, 96), (63, 96), device=device, dtype=torch.float32
    )
    inputs = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    outputs = rms_norm(x, weight, eps=EPS, offset=offset, residual_TD=residual)
    grads = torch.autograd.grad(outputs, inputs, (grad, grad_sum))
    module = kind(96, eps=EPS).to(device)
    plain_sum = x + residual
    normed = torch.func.functional_call(module, {"weight": weight}, plain_sum)
    expected = torch.autograd.grad((normed, plain_sum), inputs, (grad, grad_sum))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rotation_gradients_are_those_of_transformers(device) -> None:
    q, k, weight, grad_q, grad_k = random_tensors(
        (63, 3, 32),
        (63, 1, 32),
        (32,),
        (63, 3, 32),
        (63, 1, 32),
        device=device,
        dtype=torch.float32,
    )
    cos, sin = angles(restarting_positions(63), 32, device=device, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (q, k, weight)]
    outputs = norm_rope(q, k, cos, sin, q_weight_K=weight, k_weight_K=weight, eps=EPS)
    grads = torch.autograd.grad(outputs, inputs, (grad_q, grad_k))
    module = Qwen3RMSNorm(32, eps=EPS).to(device)
    heads = [torch.func.functional_call(module, {"weight": weight}, x) for x in (q, k)]
    plain = apply_rotary_pos_emb(*heads, cos, sin, unsqueeze_dim=1)
    expected = torch.autograd.grad(plain, inputs, (grad_q, grad_k))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradients_are_those_of_transformers(device, activation) -> None:
    gate, up, grad = random_tensors(*[(63, 96)] * 3, device=device, dtype=torch.float32)
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    grads = torch.autograd.grad(gated_activation(*inputs, activation=activation), inputs, grad)
    plain = ACT2FN[ACTIVATIONS[activation]](gate) * up
    for ours, theirs in zip(grads, torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_kernels_leave_gradients_to_the_reference(device, monkeypatch, caplog) -> None:
    monkeypatch.setattr(fused_norm, "runs_triton", lambda x, *, fp8: True)
    x = torch.ones(2, 16, device=device)
    weight = torch.ones(16, device=device, requires_grad=True)
    fused_norm._log_path.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert rms_norm(x, weight, eps=EPS)[0].requires_grad
            with torch.no_grad():
                rms_norm(x, weight, eps=EPS)
    paths = [f"rms_norm runs on its {path} path" for path in ("reference", "triton")]
    assert caplog.messages == paths
    fused_norm._log_path.cache_clear()
    with pytest.raises(ShapeError, match="weight: should not require gradients in FP8"):
        rms_norm(x, weight, eps=EPS, quantize=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_TD": torch.zeros(1, 3, 16)}, "x: should be a matrix"),
        ({"x_TD": torch.zeros(16, 3).T}, "x: should have columns of stride 1"),
        ({"x_TD": torch.zeros(3, 16, dtype=torch.int32)}, "x: should be bf16, fp16 or fp32"),
        ({"weight_D": torch.zeros(15)}, "weight: should have shape"),
        ({"weight_D": torch.zeros(16, dtype=torch.int32)}, "weight: should have a floating dtype"),
        ({"weight_D": torch.zeros(16, device="meta")}, "weight: should be on cpu, is on meta"),
        ({"residual_TD": torch.zeros(2, 16)}, "residual: should have shape"),
        ({"residual_TD": torch.zeros(3, 16).half()}, "residual: should have torch.float32"),
        ({"residual_TD": torch.zeros(16, 3).T}, "residual: should have columns of stride 1"),
    ],
)
def test_norms_of_what_does_not_fit_are_refused(changes, message) -> None:
    fitting = {"x_TD": torch.zeros(3, 16), "weight_D": torch.zeros(16)}
    with pytest.raises(ShapeError, match=message):
        rms_norm(**{**fitting, **changes}, eps=EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_THK": torch.zeros(3, 32)}, "q, k: should be THK and TGK"),
        ({"k_TGK": torch.zeros(2, 1, 16)}, "k: should have q's 3 tokens and head size 16"),
        ({"k_TGK": torch.zeros(3, 1, 16).half()}, "q, k: should share one floating dtype"),
        ({"q_THK": torch.zeros(3, 16, 2).mT}, "q: should have a last stride of 1"),
        ({"cos_TK": torch.zeros(3, 8)}, "cos: should have shape"),
        ({"sin_TK": torch.zeros(1, 16)}, "sin: should have shape"),
        ({"q_weight_K": torch.zeros(2, 16)}, "q_weight: should have shape"),
        ({"k_weight_K": torch.zeros(8)}, "k_weight: should have shape"),
        ({"q_THK": torch.zeros(3, 2, 15), "k_TGK": torch.zeros(3, 1, 15)}, "an even head size"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes, message) -> None:
    fitting = {
        "q_THK": torch.zeros(3, 2, 16),
        "k_TGK": torch.zeros(3, 1, 16),
        "cos_TK": torch.zeros(3, 16),
        "sin_TK": torch.zeros(3, 16),
    }
    with pytest.raises(ShapeError, match=message):
        norm_rope(**{**fitting, **changes}, eps=EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_TI": torch.zeros(16)}, "gate: should be a matrix"),
        ({"up_TI": torch.zeros(3, 15)}, "up: should have shape"),
        ({"up_TI": torch.zeros(3, 16).half()}, "up: should have torch.float32"),
        ({"up_TI": torch.zeros(16, 3).T}, "up: should have columns of stride 1"),
        ({"activation": "relu"}, "activation: should be silu or gelu_tanh, is relu"),
        (
            {"gate_TI": torch.zeros(3, 16, requires_grad=True), "quantize": True},
            "gate: should not require gradients in FP8",
        ),
    ],
)
def test_gates_that_do_not_fit_are_refused(changes, message) -> None:
    fitting = {
        "gate_TI": torch.zeros(3, 16),
        "up_TI": torch.zeros(3, 16),
        "activation": "silu",
    }
    with pytest.raises(ShapeError, match=message):
        gated_activation(**{**fitting, **changes})
