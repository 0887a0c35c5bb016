"""Row-wise FP8: the quantised numbers, their product, and the layer that keeps them."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankonce.errors import ShapeError
from rankonce.kernels import fp8_linear as fp8
from rankonce.kernels.fp8_linear import (
    Fp8Linear,
    QuantizedRows,
    fits_fp8,
    fp8_linear,
    quantize_rows,
)
from rankonce.kernels.fp8_linear import triton as fp8_triton
from rankonce.kernels.fp8_linear.reference import fp8_linear_reference, quantize_rows_reference

PATHS = [quantize_rows_reference, fp8_triton.quantize_rows_triton]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The widest is read in two sweeps.
SHAPES = [(1, 16), (63, 48), (500, 96), (5, 1024), (2, 20000)]

Quantize = Callable[[Tensor], QuantizedRows]


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory that a kernel forgets to write show."""
    bare = torch.empty

    def empty(*args, **kwargs) -> Tensor:
        tensor = bare(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


def random_rows(
    num_rows: int, width: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(num_rows * width)
    rows = torch.randn(num_rows, width, generator=generator)
    return (rows * torch.randn(num_rows, 1, generator=generator).exp()).to(device, dtype)


def bits(rows: QuantizedRows) -> tuple[Tensor, Tensor]:
    return rows.values_TD.view(torch.uint8), rows.scale_T.view(torch.int32)


def assert_same_bits(actual: QuantizedRows, expected: QuantizedRows) -> None:
    for ours, theirs in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_quantise_to_the_same_bits(device, shape, dtype) -> None:
    x = random_rows(*shape, device=device, dtype=dtype)
    assert_same_bits(fp8_triton.quantize_rows_triton(x), quantize_rows_reference(x))


@pytest.mark.parametrize("path", PATHS)
def test_a_value_is_off_by_half_a_step_at_most(device, path: Quantize) -> None:
    x = random_rows(63, 96, device=device)
    rows = path(x)
    torch.testing.assert_close(rows.scale_T, x.abs().amax(1) / 448)
    # Three bits after the leading one; steps of 2 ** -9 below the smallest normal number.
    bound = torch.maximum(x.abs() * 2**-4, rows.scale_T[:, None] * 2**-10)
    error = rows.dequantize(torch.float64) - x.double()
    assert (error.abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("path", PATHS)
def test_zero_and_tiny_rows_stay_finite(device, path: Quantize) -> None:
    x = torch.zeros(3, 48, device=device)
    x[1] = 1e-38
    x[2] = 3e38
    out = path(x).dequantize(torch.float32)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    torch.testing.assert_close(out[2], x[2])


# The interpreter computes with numpy, which warns of infinity times zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [48, 20000])
def test_a_row_with_nan_or_infinity_is_nowhere_finite(device, path, fault, width) -> None:
    x = random_rows(4, width, device=device)
    clean = path(x)
    x[2, 7] = fault
    rows = path(x)
    assert not rows.dequantize(torch.float32)[2].isfinite().any()
    others = [0, 1, 3]
    assert torch.equal(rows.values_TD[others].float(), clean.values_TD[others].float())
    weight = quantize_rows_reference(random_rows(16, width, device=device))
    for product in products(device):
        out = product(rows, weight, None, torch.float32)
        assert not out[2].isfinite().any()
        assert out[others].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_the_rows_beside_it(device, path: Quantize) -> None:
    x = random_rows(63, 96, device=device, dtype=torch.bfloat16)
    together = path(x)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))[:40].to(device)
    for chosen in (order, order[:1]):
        expected = QuantizedRows(
            values_TD=together.values_TD.view(torch.uint8)[chosen].view(torch.float8_e4m3fn),
            scale_T=together.scale_T[chosen],
        )
        assert_same_bits(path(x[chosen]), expected)


@pytest.mark.parametrize("path", PATHS)
def test_strided_rows_are_read_in_place(device, path: Quantize) -> None:
    x = random_rows(63, 144, device=device)
    assert_same_bits(path(x[::2, 48:]), path(x[::2, 48:].contiguous()))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_give_no_rows(device, path: Quantize) -> None:
    rows = path(torch.zeros(0, 48, device=device))
    assert rows.shape == (0, 48)
    assert rows.scale_T.shape == (0,)
    weight = quantize_rows_reference(random_rows(32, 48, device=device))
    for product in products(device):
        assert product(rows, weight, None, torch.bfloat16).shape == (0, 32)


def test_row_offsets_pass_two_to_the_31(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # memory that nobody touches costs nothing
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = x.as_strided((3, 64), (2**30, 1))
    x.copy_(random_rows(3, 64))
    assert_same_bits(fp8_triton.quantize_rows_triton(x), quantize_rows_reference(x.contiguous()))


def reference_product(x, weight, bias_N, out_dtype) -> Tensor:
    return fp8_linear_reference(x, weight, bias_N=bias_N, out_dtype=out_dtype)


def products(device: str) -> list[Callable[..., Tensor]]:
    """The reference, and PyTorch's product where the device has one; a CPU has."""
    if device == "cuda" and not fp8.has_fp8(torch.device(device)):
        return [reference_product]
    return [reference_product, fp8._scaled_product]


@pytest.mark.parametrize("num_rows", [1, 63, 500])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_the_product_is_that_of_the_quantised_numbers(
    device, num_rows, with_bias, out_dtype
) -> None:
    x = quantize_rows_reference(random_rows(num_rows, 96, device=device))
    weight = quantize_rows_reference(random_rows(48, 96, device=device))
    bias = random_rows(1, 48, device=device)[0].bfloat16() if with_bias else None
    exact = x.dequantize(torch.float64) @ weight.dequantize(torch.float64).T
    # Rounding errors grow with the terms of a sum, not with the sum.
    size = x.dequantize(torch.float64).abs() @ weight.dequantize(torch.float64).abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    for product in products(device):
        out = product(x, weight, bias, out_dtype)
        assert out.dtype == out_dtype
        rounded_to = torch.bfloat16 if product is fp8._scaled_product else out_dtype
        step = torch.finfo(rounded_to).eps
        # On Hopper the tensor cores keep some 14 bits of a partial sum.
        kept = 2**-12 if device == "cuda" and product is fp8._scaled_product else 1e-6
        error = (out.double() - exact).abs()
        assert (error <= exact.abs() * step + size * kept).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_close_to_the_one_it_replaces(device, bias) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=bias).to(device)
    x = random_rows(63, 96, device=device)
    with torch.no_grad():
        expected = linear(x)
        error = Fp8Linear.from_linear(linear)(x) - expected
    # Each operand is off by 2.6 % on average.
    assert error.norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_the_layer_takes_quantised_rows_and_leading_dimensions(device) -> None:
    layer = Fp8Linear.from_linear(nn.Linear(48, 32).to(device, torch.bfloat16))
    x = random_rows(6, 48, device=device, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(layer(quantize_rows(x)), out)
    assert torch.equal(layer(x.view(1, 2, 3, 48)), out.view(1, 2, 3, 32))
    assert layer(x.float()).dtype == torch.float32


@torch.no_grad()
def test_the_layer_keeps_fp8_through_saving_and_casting(device) -> None:
    linear = nn.Linear(48, 32).to(device, torch.bfloat16)
    layer = Fp8Linear.from_linear(linear)
    x = random_rows(5, 48, device=device, dtype=torch.bfloat16)
    expected = layer(x)
    assert not list(layer.parameters())
    held = sum(buffer.numel() * buffer.itemsize for buffer in layer.buffers())
    assert held == 48 * 32 + 4 * 32 + 2 * 32

    loaded = Fp8Linear(48, 32, bias=True, dtype=torch.bfloat16, device=device)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), expected)

    cast = nn.Sequential(loaded).half()[0]
    assert cast.values_ND.dtype == torch.float8_e4m3fn
    assert cast.scale_N.dtype == torch.float32
    assert cast.bias_N.dtype == cast.dtype == torch.float16
    assert cast(quantize_rows(x)).dtype == torch.float16
    assert torch.equal(cast.bfloat16()(x), expected)


def test_layers_that_do_not_fit_are_named() -> None:
    assert fits_fp8(nn.Linear(48, 32))
    for linear in (nn.Linear(40, 32), nn.Linear(48, 33)):
        assert not fits_fp8(linear)
        with pytest.raises(ShapeError, match="multiples of 16"):
            Fp8Linear.from_linear(linear)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 16), "x: should be a matrix"),
        (torch.zeros(2, 0), "x: should be a matrix with columns"),
        (torch.zeros(2, 16, dtype=torch.int32), "x: should be bf16, fp16 or fp32"),
        (torch.zeros(2, 16, dtype=torch.float8_e4m3fn), "x: should be bf16, fp16 or fp32"),
        (torch.zeros(16, 2).T, "x: should have columns of stride 1"),
        (torch.zeros(2, 16, requires_grad=True), "x: should not require gradients"),
    ],
)
def test_rows_that_cannot_be_quantised_are_refused(x, message) -> None:
    with pytest.raises(ShapeError, match=message):
        quantize_rows(x)


def rows_like(values_TD: Tensor, num_scales: int | None = None, **kwargs) -> QuantizedRows:
    scales = torch.ones(values_TD.shape[0] if num_scales is None else num_scales, **kwargs)
    return QuantizedRows(values_TD=values_TD, scale_T=scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": rows_like(torch.zeros(3, 32))}, "x: should be float8_e4m3fn with fp32 scales"),
        (
            {"x": rows_like(torch.zeros(3, 32).to(torch.float8_e4m3fn), dtype=torch.float64)},
            "x: should be float8_e4m3fn with fp32 scales",
        ),
        (
            {"x": rows_like(torch.zeros(3, 32).to(torch.float8_e4m3fn), 2)},
            "x: should be a matrix with a scale for each row",
        ),
        ({"x": quantize_rows(torch.zeros(3, 48))}, "x: should have weight's 32 columns"),
        ({"weight": quantize_rows(torch.zeros(15, 32))}, "weight: sizes should be multiples"),
        ({"bias_N": torch.zeros(17)}, "bias: should have 16 entries"),
    ],
)
def test_products_that_do_not_fit_are_refused(changes, message) -> None:
    fitting = {
        "x": quantize_rows(torch.zeros(3, 32)),
        "weight": quantize_rows(torch.zeros(16, 32)),
    }
    arguments = {**fitting, **changes}
    with pytest.raises(ShapeError, match=message):
        fp8_linear(
            arguments.pop("x"), arguments.pop("weight"), out_dtype=torch.float32, **arguments
        )


def test_the_path_taken_is_logged_once(monkeypatch, caplog, device) -> None:
    fp8._log_path.cache_clear()
    monkeypatch.setattr(fp8, "runs_triton", lambda x, *, fp8: fp8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            quantize_rows(torch.zeros(2, 16, device=device))
    assert caplog.messages == ["quantize_rows runs on its triton path"]
    fp8._log_path.cache_clear()
