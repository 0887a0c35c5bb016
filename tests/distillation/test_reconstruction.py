"""The choice of inputs and the fit of what stays, against least squares and all choices."""

from itertools import combinations

import pytest
import torch

from rankonce.distillation.reconstruction import choose_inputs


def draw(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw inputs that depend on each other, and weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TN = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mix
    return x_TN, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def damped_error(x_TN: torch.Tensor, weight_DN: torch.Tensor, columns: list[int]) -> float:
    """Fit by lstsq on data that hold the damping as rows of their own."""
    damping = 1e-3 * x_TN.square().sum(0).mean()
    rows = torch.cat((x_TN, damping.sqrt() * torch.eye(x_TN.shape[1], dtype=x_TN.dtype)))
    wanted = rows @ weight_DN.T
    fitted = torch.linalg.lstsq(rows[:, columns], wanted).solution
    rest = rows[:, columns] @ fitted - wanted
    return float(rest.square().sum() / wanted.square().sum())


@pytest.mark.parametrize("block", [1, 3])
def test_the_fit_is_that_of_least_squares(block: int) -> None:
    x_TN, weight_DN = draw(63, 15, 7)
    fit = choose_inputs(x_TN.T @ x_TN, weight_DN, num_kept=6 // block, block=block)
    columns = [int(one) * block + i for one in fit.kept for i in range(block)]
    assert fit.error == pytest.approx(damped_error(x_TN, weight_DN, columns), rel=1e-9)
    gone = sorted(set(range(15)) - set(columns))
    assert not fit.weight_DN[:, gone].any()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_among_the_best_of_all(block: int, seed: int) -> None:
    x_TN, weight_DN = draw(50, 10, 4, seed)
    count = 10 // block
    num_kept = count // 2
    fit = choose_inputs(x_TN.T @ x_TN, weight_DN, num_kept=num_kept, block=block)
    errors = {
        chosen: damped_error(
            x_TN, weight_DN, [one * block + i for one in chosen for i in range(block)]
        )
        for chosen in combinations(range(count), num_kept)
    }
    kept = tuple(fit.kept.tolist())
    assert fit.error == pytest.approx(errors[kept], rel=1e-9)
    ranked = sorted(errors.values())
    # Greedy removal and exchanges: not always the best choice.
    assert fit.error <= ranked[max(2, len(ranked) // 50)]


def test_exchanges_lower_the_error_of_greedy_removal() -> None:
    found = []
    for seed in range(30):
        x_TN, weight_DN = draw(40, 21, 3, seed)
        fit = choose_inputs(x_TN.T @ x_TN, weight_DN, num_kept=9)
        if fit.num_exchanges:
            found.append(fit)
            assert fit.error < _greedy_error(x_TN, weight_DN, 9)
    assert found


def _greedy_error(x_TN: torch.Tensor, weight_DN: torch.Tensor, num_kept: int) -> float:
    columns = list(range(x_TN.shape[1]))
    while len(columns) > num_kept:
        without = [[other for other in columns if other != one] for one in columns]
        columns = min(without, key=lambda some: damped_error(x_TN, weight_DN, some))
    return damped_error(x_TN, weight_DN, columns)


def test_a_dead_input_goes_first_and_a_copy_costs_next_to_nothing() -> None:
    x_TN, weight_DN = draw(80, 9, 5)
    x_TN[:, 4] = 0
    x_TN[:, 7] = 2 * x_TN[:, 2]
    products = x_TN.T @ x_TN
    assert choose_inputs(products, weight_DN, num_kept=8).kept.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    fit = choose_inputs(products, weight_DN, num_kept=7)
    assert len({2, 7} & set(fit.kept.tolist())) == 1
    plain = weight_DN.clone()
    plain[:, [4, 7]] = 0
    difference = x_TN @ (plain - weight_DN).T
    assert fit.error < 0.01 * float(difference.square().sum() / (x_TN @ weight_DN.T).square().sum())


def test_everything_kept_changes_nothing() -> None:
    x_TN, weight_DN = draw(30, 6, 5)
    fit = choose_inputs(x_TN.T @ x_TN, weight_DN, num_kept=6)
    assert torch.allclose(fit.weight_DN, weight_DN, rtol=1e-10)
    assert fit.error < 1e-15
