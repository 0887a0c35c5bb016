"""Figures of agreement: equal, reversed and tied scores, and what is not defined."""

from dataclasses import replace

import numpy as np
import pytest

from rankonce.evaluation.agreement import compare, kendall_tau, measure_arm, top_agreement
from rankonce.evaluation.labelled_requests import LabelledRequest
from tests.benchmarks.conftest import tokens_of


def logprobs(*odds: float) -> np.ndarray:
    """Log P of two labels from the first one's log-odds, C x 2."""
    values = np.array(odds)
    return np.stack((-np.logaddexp(0, -values), -np.logaddexp(0, values)), axis=1)


def test_equal_scores_agree_in_everything() -> None:
    same = [logprobs(0.3, -1.0, 2.0), logprobs(1.0, 0.0)]
    compared = compare(same, same)
    assert (compared.top_agreement, compared.ndcg_at_1, compared.kendall_tau) == (1, 1, 1)
    assert (compared.max_delta, compared.mean_delta, compared.calibration_delta) == (0, 0, 0)


def test_reversed_scores_agree_in_nothing() -> None:
    reference, other = logprobs(-1.0, 0.0, 2.0), logprobs(2.0, 0.0, -1.0)
    compared = compare([reference], [other])
    assert (compared.top_agreement, compared.kendall_tau) == (0, -1)
    p_low, p_middle, p_high = 1 / (1 + np.exp([1.0, 0.0, -2.0]))
    assert p_middle == 0.5
    assert compared.ndcg_at_1 == pytest.approx(p_low / p_high)
    assert compared.calibration_delta == pytest.approx(2 / 3 * (p_high - p_low))
    assert compared.max_delta == pytest.approx(np.abs(reference - other).max())
    assert compared.mean_delta == pytest.approx(np.abs(reference - other).mean())


def test_figures_are_means_over_requests() -> None:
    one, other = logprobs(0.0, 1.0), logprobs(1.0, 0.0)
    compared = compare([one, one, one, one], [one, one, one, other])
    assert compared.top_agreement == 0.75
    assert compared.kendall_tau == 0.5
    assert compared.top_agreement_error == pytest.approx(np.sqrt(0.75 * 0.25 / 4))


def test_a_tie_for_the_first_place_counts_in_part() -> None:
    reference = np.array([1.0, 3.0, 2.0])
    assert top_agreement(reference, np.array([0.0, 5.0, 5.0])) == 0.5
    assert top_agreement(reference, np.zeros(3)) == pytest.approx(1 / 3)


def test_ties_of_the_reference_are_equally_right() -> None:
    reference = np.array([3.0, 3.0, 2.0])
    assert top_agreement(reference, np.array([1.0, 2.0, 0.0])) == 1
    assert top_agreement(reference, np.array([1.0, 2.0, 9.0])) == 0


def test_kendall_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for size in (2, 3, 63, 1500):
        reference = generator.integers(0, 20, size).astype(float)
        reference[0] = -1.0
        other = reference + generator.integers(-4, 5, size)
        other[-1] = 50.0
        expected = stats.kendalltau(reference, other).statistic
        assert kendall_tau(reference, other) == pytest.approx(expected)


def test_scores_that_all_fell_together_have_no_order() -> None:
    assert kendall_tau(np.arange(5.0), np.zeros(5)) == 0
    assert np.isnan(kendall_tau(np.zeros(5), np.arange(5.0)))


def test_equal_texts_are_not_asked_for_distinct_scores() -> None:
    tokens = tokens_of(4)
    tokens = replace(tokens, segment_ids=(*tokens.segment_ids, tokens.segment_ids[0]))
    request = LabelledRequest(tokens=tokens, labels=(1, 0, 0, 0, None))
    healthy, tied = logprobs(4.0, 3.0, 2.0, 1.0, 4.0), logprobs(4.0, 3.0, 3.0, 3.0, 4.0)
    # The last bit of the same text may differ.
    healthy[4] = np.nextafter(healthy[0], 0)
    scores = {"bf16": [healthy], "fp32": [healthy], "fp8": [tied]}
    assert measure_arm("bf16", scores, [request])["distinct_score_ratio"] == 1
    measured = measure_arm("fp8", scores, [request])
    assert measured["distinct_score_ratio"] == 0.5
    assert measured["bars_met"] == {
        "top_agreement": True,
        "kendall_tau": False,
        "distinct_score_ratio": False,
    }
    assert (measured["auc"], measured["label_ndcg_at_1"]) == (1, 1)
