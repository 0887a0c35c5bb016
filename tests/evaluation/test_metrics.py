"""Metrics against scikit-learn and brute force; the bootstrap against repeated rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rankonce.errors import DataError
from rankonce.evaluation import metrics
from rankonce.evaluation.weighted_metrics import METRICS

Array = NDArray[Any]
# Scores from few values, so that ties are the rule.
ROW = st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.25, 0.5, 0.7, 0.9]), st.integers(0, 3))
ROWS = st.lists(ROW, min_size=1, max_size=40).map(lambda rows: np.array(rows).T)


def draw_rows(num_rows: int, num_members: int = 40, seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw labels that follow their probabilities, and members."""
    generator = np.random.default_rng(seed)
    probabilities = generator.beta(2, 2, num_rows)
    labels = (generator.random(num_rows) < probabilities).astype(np.int64)
    return labels, probabilities, generator.integers(0, num_members, num_rows)


def same(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(ROWS)
@settings(deadline=None)
def test_auc_counts_pairs_with_half_for_ties(rows: Array) -> None:
    labels, scores, _ = rows
    ones, zeros = scores[labels == 1], scores[labels == 0]
    wins = (ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros)
    assert same(metrics.auc(labels, scores), wins.mean() if wins.size else math.nan)


@given(ROWS)
@settings(deadline=None)
def test_uauc_is_the_mean_of_the_members_auc(rows: Array) -> None:
    labels, scores, members = rows
    parts = [metrics.auc(labels[members == m], scores[members == m]) for m in np.unique(members)]
    defined = [part for part in parts if not math.isnan(part)]
    expected = float(np.mean(defined)) if defined else math.nan
    assert same(metrics.uauc(labels, scores, members), expected)


@pytest.mark.parametrize("num_rows", [63, 500, 5000])
def test_metrics_equal_those_of_scikit_learn(num_rows: int) -> None:
    labels, scores, _ = draw_rows(num_rows)
    for values in (scores, scores.round(1)):
        expected = sklearn.metrics.roc_auc_score(labels, values)
        assert same(metrics.auc(labels, values), expected)
    assert same(metrics.log_loss(labels, scores), sklearn.metrics.log_loss(labels, scores))


@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_ndcg_equals_that_of_scikit_learn_for_grades_and_ties(k: int, digits: int) -> None:
    generator = np.random.default_rng(k)
    gains = generator.integers(0, 4, (20, 12)).astype(np.float64)
    gains[3] = 0
    scores = generator.random((20, 12)).round(digits)
    # scikit-learn counts a member without gain as 0; here it is left out.
    expected = sklearn.metrics.ndcg_score(np.delete(gains, 3, 0), np.delete(scores, 3, 0), k=k)
    members = np.repeat(np.arange(20), 12)
    shuffled = generator.permutation(240)
    found = metrics.ndcg_at_k(
        gains.ravel()[shuffled], scores.ravel()[shuffled], members[shuffled], k=k
    )
    assert same(found, expected)


def test_ndcg_by_its_name_has_exponential_gains() -> None:
    found = metrics.bootstrap_over_members("ndcg@10", [1, 4, 0], [3.0, 2.0, 1.0], [7, 7, 7])
    discount = math.log2(3)
    assert found.value == pytest.approx((1 + 15 / discount) / (15 + 1 / discount))


@given(ROWS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_order_of_the_rows_does_not_matter(rows: Array, random: Any) -> None:
    order = random.sample(range(rows.shape[1]), rows.shape[1])
    ones = np.ones(rows.shape[1])
    for prepare in METRICS.values():
        assert same(prepare(*rows)(ones), prepare(*rows[:, order])(ones))


def test_the_constant_mean_has_a_normalised_entropy_of_one() -> None:
    labels, scores, _ = draw_rows(500)
    assert same(metrics.normalised_entropy(labels, np.full(500, labels.mean())), 1.0)
    assert metrics.normalised_entropy(labels, scores) < 1


def test_log_loss_takes_soft_labels_and_bounds_certain_mistakes() -> None:
    assert same(metrics.log_loss([0.5], [0.5]), math.log(2))
    assert same(metrics.log_loss([0.25], [0.25]), -0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert metrics.log_loss([1], [0]) == pytest.approx(34.54, abs=0.01)


def test_calibration_error_equals_a_slow_count_over_bins_of_equal_mass() -> None:
    labels, scores, _ = draw_rows(600)
    bins = np.split(np.argsort(scores), 12)
    gaps = [abs(scores[rows].mean() - labels[rows].mean()) for rows in bins]
    assert same(
        metrics.expected_calibration_error(labels, scores, num_bins=12), float(np.mean(gaps))
    )


def test_calibration_error_is_small_for_true_probabilities_and_large_for_squared_ones() -> None:
    labels, scores, _ = draw_rows(20_000)
    assert metrics.expected_calibration_error(labels, scores) < 0.02
    assert metrics.expected_calibration_error(labels, scores**2) > 0.15


def test_equal_probabilities_share_one_bin_of_the_calibration_error() -> None:
    assert same(metrics.expected_calibration_error([0, 0, 1, 1], [0.5] * 4, num_bins=4), 0.0)


def test_distinct_score_ratio_counts_a_text_once() -> None:
    assert metrics.distinct_score_ratio([0.1, 0.2, 0.3]) == 1
    assert metrics.distinct_score_ratio([0.1, 0.1, 0.3, 0.3]) == 0.5
    assert metrics.distinct_score_ratio([0.1, 0.1, 0.3], ["Heat", "Heat", "Alien"]) == 1
    assert math.isnan(metrics.distinct_score_ratio([]))


def test_cold_buckets_split_by_history_length_and_keep_empty_ones() -> None:
    lengths = [0, 1, 5, 6, 10, 11, 100, 101]
    labels = [1, 0, 1, 1, 0, 0, 0, 1]
    buckets = metrics.cold_buckets(labels, np.arange(8.0), lengths)
    found = [(bucket.history_length, bucket.count) for bucket in buckets]
    assert found == [("0", 1), ("1-5", 2), ("6-10", 2), ("11-100", 2), (">100", 1)]
    assert [bucket.auc for bucket in buckets[1:3]] == [1.0, 0.0]
    assert all(math.isnan(buckets[index].auc) for index in (0, 3, 4))
    assert [bucket.count for bucket in metrics.cold_buckets([], [], [])] == [0] * 5


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_metrics_of_one_label_only_are_nan_where_they_say_so(labels: list[int]) -> None:
    scores, members = [0.5] * len(labels), [1] * len(labels)
    assert math.isnan(metrics.auc(labels, scores))
    assert math.isnan(metrics.uauc(labels, scores, members))
    assert math.isnan(metrics.normalised_entropy(labels, scores))
    assert math.isnan(metrics.ndcg_at_k(labels, scores, members, k=1)) == (sum(labels) == 0)
    assert math.isnan(metrics.log_loss(labels, scores)) == (not labels)
    assert math.isnan(metrics.expected_calibration_error(labels, scores)) == (not labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([0, 1], [0.5]), r"scores: should have shape \(2,\), not \(1,\)"),
        (lambda: metrics.auc([0, 1], [0.5, math.nan]), "scores: should be finite"),
        (lambda: metrics.auc([0, 1], [0.5, math.inf]), "scores: should be finite"),
        (lambda: metrics.auc([0, 2], [0.5, 0.5]), r"labels: should lie in 0\.\.1"),
        (lambda: metrics.auc([0, 0.5], [0.5, 0.5]), "labels: should be 0 or 1"),
        (lambda: metrics.auc(["No", "Yes"], [0.5, 0.5]), "labels: should be numbers"),
        (lambda: metrics.auc([[0, 1]], [[0.5, 0.5]]), "labels: should have one dimension"),
        (lambda: metrics.uauc([0, 1], [0.5, 0.5], [1]), "members: should have shape"),
        (lambda: metrics.ndcg_at_k([-1], [0.5], [1], k=1), "gains: should lie in 0"),
        (lambda: metrics.ndcg_at_k([1], [0.5], [1], k=0), "k: should be at least 1"),
        (lambda: metrics.log_loss([1], [1.5]), r"probabilities: should lie in 0\.\.1"),
        (lambda: metrics.log_loss([-0.1], [0.5]), r"labels: should lie in 0\.\.1"),
        (lambda: metrics.normalised_entropy([1], [0.5, 0.5]), "probabilities: should have shape"),
        (lambda: metrics.expected_calibration_error([1], [1], num_bins=0), "num_bins: should be"),
        (lambda: metrics.cold_buckets([1], [1], [-1]), "history_lengths: should lie in 0"),
        (lambda: metrics.cold_buckets([1], [1], [1, 2]), "history_lengths: should have shape"),
        (lambda: metrics.distinct_score_ratio([1], ["a", "b"]), "texts: should have shape"),
        (lambda: metrics.bootstrap_over_members("mrr", [1], [1], [1]), "metric: should be one of"),
        (
            lambda: metrics.bootstrap_over_members("auc", [1], [1], [1], num_resamples=1),
            "num_resamples: should be at least 2",
        ),
        (
            lambda: metrics.bootstrap_over_members("auc", [0, 1], [1, 2], [1]),
            r"members: should have shape \(2,\)",
        ),
    ],
)
def test_input_that_cannot_be_meant_is_refused_by_name(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("name", METRICS)
def test_weighing_members_equals_repeating_their_rows(name: str) -> None:
    labels, scores, members = draw_rows(400)
    times = np.random.default_rng(1).integers(0, 4, 40)
    copies = np.concatenate([np.arange(count) for count in times[members]])
    rows = np.repeat(np.arange(400), times[members])
    # Each copy of a member is a member of its own.
    repeated = METRICS[name](labels[rows], scores.round(2)[rows], members[rows] * 10 + copies)
    weighted = METRICS[name](labels, scores.round(2), members)
    assert same(weighted(times[members].astype(np.float64)), repeated(np.ones(len(rows))))


def test_the_standard_error_of_a_mean_over_equal_members_is_the_textbook_one() -> None:
    labels, scores, _ = draw_rows(4000)
    members = np.repeat(np.arange(200), 20)
    losses = [metrics.log_loss(labels[members == m], scores[members == m]) for m in range(200)]
    found = metrics.bootstrap_over_members("log_loss", labels, scores, members, num_resamples=2000)
    assert found.value == pytest.approx(metrics.log_loss(labels, scores))
    assert found.standard_error == pytest.approx(np.std(losses, ddof=1) / math.sqrt(200), rel=0.1)
    assert found.low == pytest.approx(found.value - 1.96 * found.standard_error, abs=2e-3)
    assert found.high == pytest.approx(found.value + 1.96 * found.standard_error, abs=2e-3)


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    labels, scores, members = draw_rows(500)
    first = metrics.bootstrap_over_members("uauc", labels, scores, members, seed=3)
    assert first == metrics.bootstrap_over_members("uauc", labels, scores, members, seed=3)
    assert first != metrics.bootstrap_over_members("uauc", labels, scores, members, seed=4)


def test_a_paired_difference_is_surer_than_its_parts() -> None:
    labels, scores, members = draw_rows(3000)
    worse = scores + np.random.default_rng(5).normal(0, 0.05, 3000)
    alone = metrics.bootstrap_over_members("auc", labels, scores, members)
    pair = metrics.paired_bootstrap_over_members("auc", labels, scores, worse, members)
    assert pair.value == pytest.approx(metrics.auc(labels, scores) - metrics.auc(labels, worse))
    assert pair.standard_error < 0.5 * alone.standard_error
    back = metrics.paired_bootstrap_over_members("auc", labels, worse, scores, members)
    assert (back.low, back.high) == pytest.approx((-pair.high, -pair.low))
    nothing = metrics.paired_bootstrap_over_members("auc", labels, scores, scores, members)
    assert (nothing.value, nothing.standard_error) == (0, 0)


def test_an_undefined_metric_has_an_undefined_standard_error() -> None:
    found = metrics.bootstrap_over_members("auc", [1, 1], [0.1, 0.2], [1, 2])
    assert math.isnan(found.value)
    assert math.isnan(found.standard_error)
    assert math.isnan(metrics.bootstrap_over_members("auc", [], [], []).low)
