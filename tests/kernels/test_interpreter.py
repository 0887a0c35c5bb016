"""The harness: what Triton's interpreter gets wrong is wrong without it and right with it."""

import pytest
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter on a GPU")


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + index), tl.load(b_ptr + index))
    tl.store(out_ptr + index, product)


@triton.jit
def _round(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(out_ptr.dtype.element_ty))


def products(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.full((16, 16), torch.nan)
    _multiply[(1,)](a, b, out, 16)
    return out, a.float() @ b.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_right(dtype: torch.dtype) -> None:
    torch.testing.assert_close(*products(dtype), atol=1e-5, rtol=0)


def test_the_bare_interpreter_multiplies_bf16_wrongly(
    monkeypatch: pytest.MonkeyPatch, bare_dot: object
) -> None:
    # If this fails, Triton has mended its interpreter and the correction can go.
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", bare_dot)
    out, expected = products(torch.bfloat16)
    assert not torch.allclose(out, expected, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 64)
    out = torch.zeros(64, dtype=dtype)
    _round[(1,)](x, out, 64)
    assert torch.equal(out.float(), x.to(dtype).float())


def test_conversion_to_fp8_saturates() -> None:
    out = torch.zeros(2, dtype=torch.float8_e4m3fn)
    _round[(1,)](torch.tensor([500.0, -1e9]), out, 2)
    assert out.tolist() == [448.0, -448.0]
