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
    DEFAULT_CONFIG,
    ScalingStudy,
    count_weights,
    measure_scaling,
    split_requests,
)
from rankonce.benchmarks.scaling_law import Point, ScalingLaw, fit_law, predict_loss
from rankonce.benchmarks.scaling_report import describe_scaling, plot_scaling
from rankonce.errors import DataError
from rankonce.model.sizes import build_model

PLANTED = ScalingLaw(floor=0.5, size_scale=2000.0, size_power=0.6, data_scale=40.0, data_power=0.8)


def planted_points(*, noise: float, seed: int = 0) -> list[Point]:
    random = np.random.default_rng(seed)
    return [
        Point(
            size=size,
            data=data,
            loss=PLANTED.loss(size, data) * float(np.exp(noise * random.standard_normal())),
        )
        for size in (7e3, 27e3, 150e3)
        for data in (100, 300, 900)
    ]


def tiny_study(folder: Path, **changes: Any) -> ScalingStudy:
    study = ScalingStudy(
        sizes=("0.07m", "0.16m"),
        amounts=(1, 2, 4),
        held_out=("0.16m", 7),
        num_valid=3,
        config=replace(DEFAULT_CONFIG, epochs=1),
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
    train, valid = split_requests(tiny_study(tmp_path))
    assert (len(train), len(valid)) == (7, 3)
    times = [example.request.time or 0 for example in train]
    assert times != sorted(times)
    assert max(times) <= min(one.example.request.time or 0 for one in valid)
    assert not {row.request.id for row in train} & {one.example.request.id for one in valid}


def test_amounts_are_nested_and_the_prediction_is_on_disk_before_its_point_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(tmp_path)
    learn = scaling.train_network

    seen: dict[int, list[Any]] = {}

    def fail_at_the_last(network: Any, tokenizer: Any, units: Any, **more: Any) -> Any:
        seen[len(units)] = list(units)
        if len(units) == 7:
            raise KeyboardInterrupt
        return learn(network, tokenizer, units, **more)

    monkeypatch.setattr(scaling, "train_network", fail_at_the_last)
    monkeypatch.setattr(scaling, "predict_loss", partial(predict_loss, num_samples=20))
    with pytest.raises(KeyboardInterrupt):
        measure_scaling(study)
    assert sorted(seen) == [1, 2, 4, 7]
    for amount, units in seen.items():
        assert units == seen[7][:amount]
    before = json.loads(study.output.read_text())
    assert len(before["runs"]) == 6
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
    assert f"| measured | {held_out['expected_log_loss']:.4f}, " in table
    plot_scaling(tmp_path / "scaling.png", after)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(DataError, match="holds another study"):
        measure_scaling(replace(study, num_valid=2))


def test_a_point_of_the_grid_cannot_be_predicted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="held_out: should be none of the points"):
        tiny_study(tmp_path, held_out=("0.16m", 4))
