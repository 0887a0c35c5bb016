"""The scaling study: its law, the order of its steps, and a whole small run."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankonce.benchmarks import scaling
from rankonce.benchmarks.scaling import (
    ScalingStudy,
    choose_rates,
    count_weights,
    find_warnings,
    measure_scaling,
    split_requests,
)
from rankonce.benchmarks.scaling_law import Point, ScalingLaw, fit_law, predict_loss
from rankonce.benchmarks.scaling_report import describe_scaling, plot_scaling
from rankonce.errors import DataError
from rankonce.model.sizes import build_model

PLANTED = ScalingLaw(floor=0.5, size_scale=2000.0, size_power=0.6, data_scale=40.0, data_power=0.8)


def planted_points(*, noise: float, seed: int = 0, num_seeds: int = 1) -> list[Point]:
    random = np.random.default_rng(seed)
    return [
        Point(
            size=size,
            data=data,
            losses=tuple(
                PLANTED.loss(size, data) * np.exp(noise * random.standard_normal(num_seeds))
            ),
        )
        for size in (7e3, 27e3, 150e3)
        for data in (100, 300, 900)
    ]


def tiny_study(folder: Path, **changes: Any) -> ScalingStudy:
    study = ScalingStudy(
        sizes=("0.07m", "0.16m"),
        amounts=(1, 2, 4),
        held_out=("0.16m", 7),
        rates=(0.001, 0.01),
        trial_amount=3,
        num_valid=3,
        seeds=(0,),
        output=folder / "scaling.json",
    )
    return replace(study, **changes)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (1e-3, 0.25)])
def test_the_fit_finds_what_was_planted(noise: float, tolerance: float) -> None:
    law = fit_law(planted_points(noise=noise))
    assert law.size_power == pytest.approx(PLANTED.size_power, rel=tolerance)
    assert law.data_power == pytest.approx(PLANTED.data_power, rel=tolerance)
    assert law.floor == pytest.approx(PLANTED.floor, rel=tolerance)
    assert law.loss(150e3, 1800) == pytest.approx(PLANTED.loss(150e3, 1800), rel=0.01)


def test_nine_intervals_in_ten_hold_the_truth_and_widen_with_noise() -> None:
    truth = PLANTED.loss(150e3, 1800)
    held = []
    for seed in range(10):
        found = predict_loss(
            planted_points(noise=0.01, seed=seed), size=150e3, data=1800, num_samples=60
        )
        held.append(found.low <= truth <= found.high)
    assert sum(held) >= 7
    calm = predict_loss(planted_points(noise=1e-4), size=150e3, data=1800, num_samples=60)
    assert calm.high - calm.low < 0.1 * (found.high - found.low)


def test_noise_of_seeds_widens_the_interval_of_points_that_lie_on_the_law() -> None:
    on_the_law = planted_points(noise=0.0)
    noise = np.exp([0.02, -0.02])
    points = [
        replace(point, losses=tuple(point.losses[0] * noise / noise.mean())) for point in on_the_law
    ]
    sure, unsure = (
        predict_loss(which, size=150e3, data=1800, num_samples=30) for which in (on_the_law, points)
    )
    assert unsure.loss == pytest.approx(sure.loss, rel=1e-6)
    assert sure.seed_noise is None
    assert unsure.seed_noise == pytest.approx(0.02 * 2**0.5)
    # The mean of two seeds deviates by 0.02, and a new point adds its own deviation to the law's.
    assert np.log(unsure.high / unsure.low) > 2 * 1.64 * 0.02
    assert np.log(sure.high / sure.low) < 1e-3


def test_points_with_different_numbers_of_seeds_are_refused() -> None:
    points = [*planted_points(noise=0.01), *planted_points(noise=0.01, num_seeds=2)[:1]]
    with pytest.raises(DataError, match="same number of losses"):
        predict_loss(points, size=150e3, data=1800)


def test_an_exponent_on_its_bound_is_named() -> None:
    random = np.random.default_rng(0)
    # No order of sizes: what the term of size is, the points cannot say.
    points = [
        Point(size=size, data=data, losses=(0.5 + 8 / data + 1e-3 * random.standard_normal(),))
        for size in (7e3, 27e3, 150e3)
        for data in (100, 300, 900)
    ]
    found = predict_loss(points, size=150e3, data=1800, num_samples=5)
    assert {"the term of size", "a"} & set(found.on_bounds)
    assert "b" not in found.on_bounds
    clean = predict_loss(planted_points(noise=0.0), size=150e3, data=1800, num_samples=5)
    assert clean.on_bounds == ()


def record_of(*losses: float, on_bounds: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record with one run a loss, the constant at 0.7 and the truth at 0.5."""
    return {
        "truth": {"constant": 0.7, "floor": 0.5},
        "prediction": {"on_bounds": on_bounds, "seed_noise": 0.01},
        "trials": [
            {"size": "0.4m", "learning_rate": rate, "expected_log_loss": loss}
            for rate, loss in ((0.001, 0.66), (0.003, 0.6), (0.009, 0.65))
        ],
        "runs": [
            {"size": "0.4m", "weights": 148_096, "requests": 100 + n, "expected_log_loss": loss}
            for n, loss in enumerate(losses)
        ],
    }


def test_a_grid_on_a_plateau_is_warned_of() -> None:
    assert find_warnings(record_of(0.65, 0.6)) == []
    (warning,) = find_warnings(record_of(0.69, 0.6))
    assert warning.startswith("0.4m with 100 requests has gone 5.0% of the way from a constant")


def test_points_that_differ_no_more_than_seeds_do_are_warned_of() -> None:
    (warning,) = find_warnings(record_of(0.6, 0.603, 0.606, 0.609))
    assert warning.startswith(
        "log L deviates by 0.0064 between points, and by 0.0100 by the chance"
    )


def test_what_lies_on_a_bound_and_an_outermost_rate_are_warned_of() -> None:
    record = record_of(0.65, 0.6, on_bounds=("a",))
    record["trials"].append({"size": "1m", "learning_rate": 0.009, "expected_log_loss": 0.6})
    bound, rate = find_warnings(record)
    assert bound.startswith("a lies on a bound of the fit")
    assert rate == "1m has the outermost of the learning rates that were tried, 0.009"


def test_every_size_has_the_rate_of_its_best_trial() -> None:
    trials = [
        {"size": size, "learning_rate": rate, "expected_log_loss": loss}
        for size, rate, loss in (
            ("0.07m", 0.001, 0.6),
            ("0.07m", 0.01, 0.5),
            ("0.16m", 0.001, 0.4),
            ("0.16m", 0.01, 0.7),
        )
    ]
    assert choose_rates(trials) == {"0.07m": 0.01, "0.16m": 0.001}


def test_too_few_points_are_refused() -> None:
    with pytest.raises(DataError, match="points: should be more than 5"):
        fit_law(planted_points(noise=0.0)[:5])


def test_points_of_one_size_are_refused() -> None:
    points = [replace(point, size=7e3) for point in planted_points(noise=0.0)]
    with pytest.raises(DataError, match="two different values of size"):
        fit_law(points)


def test_embeddings_are_not_counted() -> None:
    network = build_model("0.07m", seed=0)
    assert count_weights(network) == sum(
        weight.numel() for name, weight in network.named_parameters() if "embed" not in name
    )


def test_valid_requests_are_the_newest_and_none_of_the_train_ones(tmp_path: Path) -> None:
    train, trial, valid = split_requests(tiny_study(tmp_path))
    assert (len(train), len(trial), len(valid)) == (7, 3, 3)
    times = [example.request.time or 0 for example in train]
    assert times != sorted(times)
    measured = [one.example.request for one in (*trial, *valid)]
    assert max(times) <= min(request.time or 0 for request in measured)
    assert [request.time for request in measured] == sorted(r.time or 0 for r in measured)
    assert len({r.id for r in [*measured, *(row.request for row in train)]}) == 13


def test_amounts_are_nested_and_the_prediction_is_on_disk_before_its_point_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(tmp_path)
    learn = scaling.train_network

    seen: dict[int, list[Any]] = {}
    rates = []

    def fail_at_the_last(network: Any, tokenizer: Any, units: Any, **more: Any) -> Any:
        seen[len(units)] = list(units)
        rates.append(more["config"].learning_rate)
        if len(units) == 7:
            raise KeyboardInterrupt
        return learn(network, tokenizer, units, **more)

    monkeypatch.setattr(scaling, "train_network", fail_at_the_last)
    monkeypatch.setattr(scaling, "predict_loss", partial(predict_loss, num_samples=20))
    with pytest.raises(KeyboardInterrupt):
        measure_scaling(study)
    assert sorted(seen) == [1, 2, 3, 4, 7]
    for amount, units in seen.items():
        assert units == seen[7][:amount]
    before = json.loads(study.output.read_text())
    assert len(before["trials"]) == 4
    assert len(before["runs"]) == 6
    chosen = choose_rates(before["trials"])
    assert rates == [0.001, 0.01] * 2 + [chosen[run["size"]] for run in before["runs"]] + [
        chosen["0.16m"]
    ]
    assert any("one seed" in warning for warning in before["warnings"])
    assert before["held_out"] == []
    prediction = before["prediction"]
    assert prediction["low"] <= prediction["loss"] <= prediction["high"]

    monkeypatch.setattr(scaling, "train_network", learn)
    after = measure_scaling(study)
    assert json.loads(study.output.read_text()) == after
    assert after["prediction"] == prediction
    assert after["runs"] == before["runs"]
    (held_out,) = after["held_out"]
    assert held_out["started"] >= prediction["written"]
    # What the simulator knows is the least that can be expected of any model.
    assert held_out["expected_log_loss"] > after["truth"]["floor"]
    table = describe_scaling(after)
    assert all(f"**Warning:** {warning}." in table for warning in after["warnings"])
    assert f"| measured | {held_out['expected_log_loss']:.4f}, " in table
    plot_scaling(tmp_path / "scaling.png", after)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(DataError, match="holds another study"):
        measure_scaling(replace(study, num_valid=2))


def test_a_point_of_the_grid_cannot_be_predicted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="held_out: should be none of the points"):
        tiny_study(tmp_path, held_out=("0.16m", 4))
