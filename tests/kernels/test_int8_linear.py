"""Int8 products: exact at the largest sums, one scale a row, and refusals."""

import pytest
import torch

from rankonce.errors import ShapeError
from rankonce.kernels import int8_linear as layers
from rankonce.kernels.int8_linear import Int8Linear, int8_linear, quantize_int8_rows
from rankonce.kernels.int8_linear.cpu import (
    REDUCED_MAX,
    cpu_path,
    int8_product_reduced,
    int8_product_vnni,
    pack_reduced,
)


@pytest.mark.parametrize(("T", "D", "N"), [(1, 1, 1), (63, 48, 35), (500, 130, 17)])
def test_products_of_this_processor_are_exact(T: int, D: int, N: int) -> None:
    generator = torch.Generator().manual_seed(T)
    weight_ND = torch.randint(-127, 128, (N, D), generator=generator).to(torch.int8)
    weight_ND[0] = 127
    values_TD = torch.randint(-63, 64, (T, D), generator=generator).to(torch.int8)
    values_TD[0] = REDUCED_MAX
    exact_TN = values_TD.long() @ weight_ND.long().T
    assert torch.equal(int8_product_reduced(values_TD, pack_reduced(weight_ND)).long(), exact_TN)
    if cpu_path() == "vnni":
        values_TD[0] = 127
        exact_TN = values_TD.long() @ weight_ND.long().T
        assert torch.equal(int8_product_vnni(values_TD, weight_ND).long(), exact_TN)


@pytest.fixture(params=["this processor's", "reduced", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of this processor, and those of others, which it computes as well."""
    if request.param in ("reduced", "reference"):
        monkeypatch.setattr(layers, "cpu_path", lambda: request.param)


@pytest.mark.usefixtures("path")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x_TD = torch.randn(63, 48) * torch.logspace(-3, 3, 63)[:, None]
    layer = Int8Linear.from_linear(torch.nn.Linear(48, 35))
    with torch.no_grad():
        together_TN = layer(x_TD)
        alone_TN = torch.cat([layer(row[None]) for row in x_TD])
    assert torch.equal(together_TN, alone_TN)


@pytest.mark.usefixtures("path")
def test_the_product_is_near_that_of_the_float_layer() -> None:
    linear = torch.nn.Linear(130, 35)
    x_TD = torch.randn(17, 130)
    with torch.no_grad():
        error_TN = Int8Linear.from_linear(linear)(x_TD) - linear(x_TD)
        assert error_TN.abs().max() < 0.03 * linear(x_TD).abs().max()


@pytest.mark.usefixtures("path")
def test_zero_rows_give_the_bias_and_broken_rows_stay_broken() -> None:
    linear = torch.nn.Linear(48, 35)
    x_TD = torch.zeros(2, 48)
    x_TD[1, 3] = torch.nan
    with torch.no_grad():
        out_TN = Int8Linear.from_linear(linear)(x_TD)
    assert torch.equal(out_TN[0], linear.bias)
    assert out_TN[1].isnan().all()


def test_wrong_columns_are_refused() -> None:
    values_ND, scale_N = quantize_int8_rows(torch.randn(5, 16))
    with pytest.raises(ShapeError, match="x: should be rows of 16 columns"):
        int8_linear(torch.randn(3, 15), values_ND, scale_N)
