"""Fits find the function that made the labels, and are measured on others."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from rankonce.calibration import Floats
from rankonce.errors import DataError
from rankonce.evaluation.calibration import (
    ScoredLabels,
    calibrate_task,
    fit_calibration,
    score_labels,
)
from rankonce.evaluation.metrics import expected_calibration_error, log_loss
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from tests.conftest import build_request
from tests.serving.conftest import build_ranker


def sigmoid(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)))


def draw(num_rows: int, *, slope: float, offset: float, seed: int = 0) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    logits = random.normal(scale=2.0, size=num_rows)
    return logits, (random.random(num_rows) < sigmoid(slope * logits + offset)).astype(np.float64)


def test_platt_finds_the_line() -> None:
    fit = fit_calibration(*draw(20_000, slope=0.5, offset=-1.0), method="platt")
    assert (fit.slope, fit.offset) == pytest.approx((0.5, -1.0), abs=0.05)


def test_temperature_finds_the_slope_and_moves_nothing_else() -> None:
    fit = fit_calibration(*draw(20_000, slope=0.4, offset=0.0), method="temperature")
    assert fit.slope == pytest.approx(0.4, abs=0.03)
    assert fit.offset == 0.0


def test_probabilities_as_labels_give_the_line_that_made_them() -> None:
    logits, _ = draw(5000, slope=1.0, offset=0.0)
    fit = fit_calibration(logits, sigmoid(1.5 * logits), method="temperature")
    assert fit.slope == pytest.approx(1.5, abs=1e-3)


def test_isotonic_is_that_of_scikit_learn_kept_from_0_and_1() -> None:
    logits, targets = draw(500, slope=2.0, offset=0.5)
    fit = fit_calibration(logits, targets, method="isotonic")
    edge = 1 / 502
    theirs = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip")
    theirs.fit(logits, targets)
    at = np.linspace(-9, 9, 333)
    assert sigmoid(fit.apply(at)) == pytest.approx(theirs.predict(at), abs=1e-9)
    assert edge <= sigmoid(fit.apply(at)).min() < sigmoid(fit.apply(at)).max() <= 1 - edge


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_labels_that_fall_with_the_score_are_refused(method: str) -> None:
    logits, targets = draw(3000, slope=1.0, offset=0.0)
    with pytest.raises(DataError, match="labels: should rise with the score"):
        fit_calibration(-logits, targets, method=method)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels: should be of two kinds"):
        fit_calibration(logits, np.ones(3000), method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_what_is_measured_was_held_out_group_by_group(method: str) -> None:
    logits, targets = draw(6000, slope=0.3, offset=0.0, seed=4)
    scored = ScoredLabels(
        logits_N=logits, targets_N=targets, groups_N=np.arange(6000, dtype=np.int64) // 7
    )
    fit = calibrate_task(scored, method=method, held_out=0.25, seed=9)  # type: ignore[arg-type]
    groups = np.unique(scored.groups_N)
    chosen = np.random.default_rng(9).permutation(groups)[: round(0.25 * len(groups))]
    is_held_out = np.isin(scored.groups_N, chosen)
    assert (fit.measured["num_fitted"], fit.measured["num_held_out"]) == (
        (~is_held_out).sum(),
        is_held_out.sum(),
    )
    again = fit_calibration(logits[~is_held_out], targets[~is_held_out], method=method)  # type: ignore[arg-type]
    for when, moved in (("before", logits), ("after", again.apply(logits))):
        shares = sigmoid(moved[is_held_out])
        expected = (
            log_loss(targets[is_held_out], shares),
            expected_calibration_error(targets[is_held_out], shares),
        )
        found = (fit.measured[f"log_loss_{when}"], fit.measured[f"calibration_error_{when}"])
        assert found == pytest.approx(expected, abs=1e-9)
    assert fit.measured["log_loss_after"] < fit.measured["log_loss_before"]
    assert fit.measured["calibration_error_after"] < fit.measured["calibration_error_before"] / 2


def test_one_group_is_too_few() -> None:
    logits, targets = draw(50, slope=1.0, offset=0.0)
    scored = ScoredLabels(logits_N=logits, targets_N=targets, groups_N=np.zeros(50, dtype=np.int64))
    with pytest.raises(DataError, match="data: should hold requests enough"):
        calibrate_task(scored, method="platt")


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return build_ranker(chat=False)


def test_scored_labels_are_log_odds_beside_the_worth_of_labels(ranker: Ranker) -> None:
    films = TrainingExample(
        request=build_request(4), labels=("Yes", None, "No", {"Yes": 0.7, "No": 0.3})
    )
    grades = TrainingExample(
        request=replace(build_request(2, task="movie-rating"), history=(), profile={}),
        labels=("5", "1"),
    )
    scored = score_labels(ranker, [films, grades, films], groups=["ann", "bob", "ann"])
    assert set(scored) == {"movie-like", "movie-rating"}
    likes = scored["movie-like"]
    assert likes.targets_N == pytest.approx([1.0, 0.0, 0.7] * 2)
    assert likes.groups_N.tolist() == [0] * 6
    values = [one.value for one in ranker.score(films.request).candidates]
    assert likes.logits_N[:3] == pytest.approx([values[0], values[2], values[3]], abs=1e-5)
    assert scored["movie-rating"].targets_N.tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="labels: should be of Yes, No"):
        score_labels(ranker, [TrainingExample(request=build_request(1), labels=("Maybe",))])
