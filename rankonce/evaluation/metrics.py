"""Metrics of ranking and calibration, and their standard error over members.

The plain metrics weigh every row 1 in ``weighted_metrics``; the bootstrap draws members with
replacement, which is one weight a row, so that all resamples share one sort. Ties count half (AUC)
or their mean discount (NDCG): neither the order of equal scores nor that of the rows matters.

A metric that the rows do not define is nan; each docstring says when. Input that cannot be meant
(lengths that differ, scores that are not finite, labels outside 0..1) raises ``DataError``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rankonce.errors import DataError
from rankonce.evaluation.weighted_metrics import (
    METRICS,
    Floats,
    WeightedMetric,
    check_lengths,
    number_values,
    read_numbers,
    weighted_auc,
    weighted_calibration_error,
    weighted_entropy,
    weighted_log_loss,
    weighted_ndcg,
    weighted_uauc,
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric, or the difference of two, with its spread over resampled members.

    Attributes:
        value: on the rows as they are.
        standard_error: standard deviation over the resamples that define the metric.
        low, high: their middle, 95 % unless another share was asked for.
    """

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ColdBucket:
    """AUC and number of the rows whose history length lies in a range such as ``"6-10"``."""

    history_length: str
    count: int
    auc: float


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a liked row scores above one that is not; ties count half.

    Args:
        labels: 0 or 1 a row.
        scores: any finite numbers, one a row.

    Returns:
        In 0..1; nan where all labels are the same.
    """
    return weighted_auc(labels, scores)(np.ones(np.size(labels)))


def uauc(labels: ArrayLike, scores: ArrayLike, members: ArrayLike) -> float:
    """Mean AUC of the members that have both labels, each counted once (CoLLM, 2023).

    Args:
        members: the member of each row; the others as in ``auc``.

    Returns:
        In 0..1; nan where no member has both labels.
    """
    return weighted_uauc(labels, scores, members)(np.ones(np.size(labels)))


def ndcg_at_k(gains: ArrayLike, scores: ArrayLike, members: ArrayLike, *, k: int) -> float:
    """Mean over members of DCG@k over the best possible DCG@k (Järvelin, Kekäläinen, 2002).

    A gain is taken as it is (``METRICS["ndcg@10"]`` takes ``exponential_gains`` of its labels) and
    divided by log2(rank + 1). Rows of equal score share the mean of their discounts (McSherry,
    Najork, 2008).

    Args:
        gains: ≥ 0, one a row.
        members: the member or query of each row.
        k: how many ranks count, at least 1.

    Returns:
        In 0..1; members without any gain are left out, nan where none is left.
    """
    return weighted_ndcg(gains, scores, members, k=k)(np.ones(np.size(gains)))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of -log P(label) in nats, with probabilities kept 1e-15 away from 0 and 1.

    Args:
        labels: in 0..1, so that a teacher's soft labels can be used.
        probabilities: P(liked), in 0..1.

    Returns:
        ≥ 0; nan without rows.
    """
    return weighted_log_loss(labels, probabilities)(np.ones(np.size(labels)))


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log-loss over that of the constant mean label; below 1 beats it (He et al., 2014).

    Returns:
        ≥ 0; nan where all labels are 0 or all are 1: that constant has no loss to divide by.
    """
    return weighted_entropy(labels, probabilities)(np.ones(np.size(labels)))


def expected_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 15
) -> float:
    """Mean |mean probability - mean label| over bins of equal mass (Nguyen, O'Connor, 2015).

    Equal probabilities stay in one bin, so that the order of the rows does not matter.

    Returns:
        In 0..1; nan without rows.
    """
    weighted = weighted_calibration_error(labels, probabilities, num_bins=num_bins)
    return weighted(np.ones(np.size(labels)))


def distinct_score_ratio(scores: ArrayLike, texts: ArrayLike | None = None) -> float:
    """Distinct scores over rows with distinct text; 1.0 is healthy, less means ties.

    Args:
        scores: finite, one a row.
        texts: the candidates' texts; each counts once, with its first score. Without them every
            row counts.

    Returns:
        Above 0, at most 1; nan without rows.
    """
    values = read_numbers("scores", scores)
    if texts is not None:
        values = values[np.unique(number_values("texts", texts, len(values)), return_index=True)[1]]
    return len(np.unique(values)) / len(values) if len(values) else np.nan


def cold_buckets(
    labels: ArrayLike, scores: ArrayLike, history_lengths: ArrayLike
) -> list[ColdBucket]:
    """AUC by history length: 0, 1-5, 6-10, 11-100 and >100 events.

    Returns:
        All five buckets; nan is the AUC of one that lacks a label.
    """
    label_values, values = read_numbers("labels", labels), read_numbers("scores", scores)
    lengths = read_numbers("history_lengths", history_lengths, low=0)
    check_lengths(len(label_values), scores=values, history_lengths=lengths)
    bucket = np.searchsorted([0, 5, 10, 100], lengths)
    return [
        ColdBucket(
            history_length=name,
            count=int((bucket == index).sum()),
            auc=auc(label_values[bucket == index], values[bucket == index]),
        )
        for index, name in enumerate(("0", "1-5", "6-10", "11-100", ">100"))
    ]


def bootstrap_over_members(
    metric: str,
    labels: ArrayLike,
    scores: ArrayLike,
    members: ArrayLike,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """Estimate a metric's standard error by drawing members with replacement (Efron, 1979).

    Rows of one member depend on each other, so members are drawn, not rows.

    Args:
        metric: a name in ``METRICS``.
        num_resamples: at least 2.
        seed: the same seed draws the same members, for every metric and model.
    """
    weighted = _prepare(metric)(labels, scores, members)
    check_lengths(np.size(labels), members=np.asarray(members))
    return bootstrap(weighted, members, num_resamples=num_resamples, seed=seed)


def paired_bootstrap_over_members(
    metric: str,
    labels: ArrayLike,
    scores: ArrayLike,
    other_scores: ArrayLike,
    members: ArrayLike,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """Estimate metric(scores) - metric(other_scores), both on the same drawn members.

    Args:
        other_scores: of the model to compare with; the others as in ``bootstrap_over_members``.
    """
    first = _prepare(metric)(labels, scores, members)
    second = _prepare(metric)(labels, other_scores, members)
    check_lengths(np.size(labels), members=np.asarray(members))
    return bootstrap(
        lambda weights: first(weights) - second(weights),
        members,
        num_resamples=num_resamples,
        seed=seed,
    )


def _prepare(metric: str) -> Callable[[ArrayLike, ArrayLike, ArrayLike], WeightedMetric]:
    if metric not in METRICS:
        raise DataError(f"metric: should be one of {', '.join(METRICS)}, not {metric!r}")
    return METRICS[metric]


def bootstrap(
    weighted: WeightedMetric,
    members: ArrayLike,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """Estimate any function of the rows' weights, members drawn with replacement.

    Args:
        members: the member of each row.
        num_resamples, seed: as in ``bootstrap_over_members``.
    """
    value, *resampled = resample(weighted, members, num_resamples=num_resamples, seed=seed)
    return summarise(value, resampled)


def resample(
    weighted: WeightedMetric, members: ArrayLike, *, num_resamples: int, seed: int = 0
) -> Floats:
    """Compute a function of the rows' weights once, and once for every draw of members.

    Returns:
        num_resamples + 1 values, that of the rows themselves first. The same members and seed give
        the same draws, so that several functions can be combined draw by draw.
    """
    if num_resamples < 2:
        raise DataError(f"num_resamples: should be at least 2, not {num_resamples}")
    member_codes = number_values("members", members, np.size(members))
    num_members = len(np.unique(member_codes))
    # Without members nothing is drawn, but the generator still wants a chance.
    chances = np.full(max(num_members, 1), 1 / max(num_members, 1))
    draws = np.random.default_rng(seed).multinomial(num_members, chances, size=num_resamples)
    values = [weighted(draw[member_codes].astype(np.float64)) for draw in draws]
    return np.array([weighted(np.ones(len(member_codes))), *values])


def summarise(value: float, resampled: ArrayLike, *, middle: float = 0.95) -> Estimate:
    """Make an estimate of a value and those of its resamples; nan among these is left out.

    Args:
        middle: share of the resamples between ``low`` and ``high``.
    """
    column = np.asarray(resampled, dtype=np.float64)
    column = column[~np.isnan(column)]
    if len(column) < 2:
        return Estimate(value=value, standard_error=np.nan, low=np.nan, high=np.nan)
    low, high = np.quantile(column, [(1 - middle) / 2, (1 + middle) / 2])
    error = float(column.std(ddof=1))
    return Estimate(value=float(value), standard_error=error, low=float(low), high=float(high))


def without_nan(value: Any) -> Any:
    """Return a record with ``None`` for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
