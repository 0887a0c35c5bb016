"""Metrics prepared for weighted rows: check and sort once, then weigh as often as needed.

``METRICS[name](labels, scores, members)`` gives a function of the row weights. ``metrics`` calls
it with ones, its bootstrap with the number of times that each row's member was drawn. What a
metric means, and when it is nan, stands with the function of its name in ``metrics``.
"""

from collections.abc import Callable, Mapping
from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankonce.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WeightedMetric = Callable[[Floats], float]
# The log of 0 is infinite; this bound makes a certain and wrong answer cost 34.5 nats.
_SMALLEST_PROBABILITY = 1e-15


def weighted_auc(
    labels: ArrayLike, scores: ArrayLike, members: ArrayLike | None = None
) -> WeightedMetric:
    """Prepare the AUC over all rows; it does not look at the members."""
    liked, values = _binary_rows(labels, scores)
    order = np.argsort(values)
    liked, values = liked[order], values[order]
    starts = np.flatnonzero(np.diff(values, prepend=-np.inf))

    def weighted(weights: Floats) -> float:
        mass = weights[order]
        ones = mass * liked
        zeros = mass - ones
        if len(starts) < len(values):
            ones, zeros = np.add.reduceat(ones, starts), np.add.reduceat(zeros, starts)
        # A liked row wins over the others of lower score, and half over those of its own.
        wins = ones @ (np.cumsum(zeros) - zeros / 2)
        return _divide(wins, ones.sum() * zeros.sum())

    return weighted


def weighted_uauc(labels: ArrayLike, scores: ArrayLike, members: ArrayLike) -> WeightedMetric:
    """Prepare the mean AUC of the members with both labels."""
    liked, values = _binary_rows(labels, scores)
    codes = number_values("members", members, len(values))
    ones, zeros = np.bincount(codes, liked), np.bincount(codes, 1 - liked)
    # Wins over the others are the liked rows' ranks less the ranks among themselves.
    ranks = _mean_over_ties(codes, values, _positions(codes, values) + 1)
    wins = np.bincount(codes, liked * ranks) - ones * (ones + 1) / 2
    defined = ones * zeros > 0
    return _mean_over_members(codes, wins / np.where(defined, ones * zeros, 1), defined)


def exponential_gains(grades: ArrayLike) -> Floats:
    """2^grade - 1 (Burges et al., 2005): grade 4 is worth fifteen times grade 1; 0 and 1 stay."""
    return np.exp2(read_numbers("grades", grades, low=0)) - 1


def weighted_ndcg(
    gains: ArrayLike, scores: ArrayLike, members: ArrayLike, *, k: int
) -> WeightedMetric:
    """Prepare the mean NDCG@k of the members with a gain."""
    if k < 1:
        raise DataError(f"k: should be at least 1, not {k}")
    gain, values = read_numbers("gains", gains, low=0), read_numbers("scores", scores)
    check_lengths(len(gain), scores=values)
    codes = number_values("members", members, len(values))
    ideal = np.bincount(codes, gain * _discounts(_positions(codes, -gain), k))
    discounts = _mean_over_ties(codes, values, _discounts(_positions(codes, -values), k))
    defined = ideal > 0
    reached = np.bincount(codes, gain * discounts)
    return _mean_over_members(codes, reached / np.where(defined, ideal, 1), defined)


def weighted_log_loss(
    labels: ArrayLike, probabilities: ArrayLike, members: ArrayLike | None = None
) -> WeightedMetric:
    """Prepare the mean log-loss; labels may be soft."""
    target, share = _probability_rows(labels, probabilities)
    share = np.clip(share, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    losses = -(target * np.log(share) + (1 - target) * np.log1p(-share))
    return lambda weights: _divide(weights @ losses, weights.sum())


def weighted_entropy(
    labels: ArrayLike, probabilities: ArrayLike, members: ArrayLike | None = None
) -> WeightedMetric:
    """Prepare the log-loss over that of the weighted rows' own mean label."""
    target, _ = _probability_rows(labels, probabilities)
    loss = weighted_log_loss(labels, probabilities)

    def weighted(weights: Floats) -> float:
        base = _divide(weights @ target, weights.sum())
        if not 0 < base < 1:
            return np.nan
        return _divide(loss(weights), -base * np.log(base) - (1 - base) * np.log1p(-base))

    return weighted


def weighted_calibration_error(
    labels: ArrayLike,
    probabilities: ArrayLike,
    members: ArrayLike | None = None,
    *,
    num_bins: int = 15,
) -> WeightedMetric:
    """Prepare the calibration error over bins of equal weight."""
    if num_bins < 1:
        raise DataError(f"num_bins: should be at least 1, not {num_bins}")
    target, share = _probability_rows(labels, probabilities)
    ties = number_values("probabilities", share, len(share))

    def weighted(weights: Floats) -> float:
        mass = np.bincount(ties, weights)
        gaps = np.bincount(ties, weights * (share - target))
        # A probability goes where the middle of its rows lies in the sorted mass.
        middle = (np.cumsum(mass) - mass / 2) / (mass.sum() or 1.0)
        bins = np.minimum((middle * num_bins).astype(np.int64), num_bins - 1)
        return _divide(np.abs(np.bincount(bins, gaps)).sum(), mass.sum())

    return weighted


METRICS: Mapping[str, Callable[[ArrayLike, ArrayLike, ArrayLike], WeightedMetric]] = {
    "auc": weighted_auc,
    "uauc": weighted_uauc,
    "ndcg@10": lambda grades, scores, members: weighted_ndcg(
        exponential_gains(grades), scores, members, k=10
    ),
    "log_loss": weighted_log_loss,
    "normalised_entropy": weighted_entropy,
    "expected_calibration_error": weighted_calibration_error,
}


def read_numbers(
    name: str, values: ArrayLike, *, low: float = -np.inf, high: float = np.inf
) -> Floats:
    """Read one column of finite numbers between two bounds.

    Raises:
        DataError: names the column and what it should hold.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: should be numbers") from error
    if column.ndim != 1:
        raise DataError(f"{name}: should have one dimension, not shape {column.shape}")
    if not np.isfinite(column).all():
        raise DataError(f"{name}: should be finite, not NaN or infinite")
    if len(column) and not low <= column.min() <= column.max() <= high:
        raise DataError(
            f"{name}: should lie in {low:g}..{high:g}, not {column.min():g}..{column.max():g}"
        )
    return column


def number_values(name: str, values: ArrayLike, num_rows: int) -> Ints:
    """Give the distinct values of a column the numbers 0, 1, ... in sorted order.

    Raises:
        DataError: the column has another length than the rows.
    """
    column = np.asarray(values)
    check_lengths(num_rows, **{name: column})
    return np.unique(column, return_inverse=True)[1].astype(np.int64)


def check_lengths(num_rows: int, **columns: NDArray[np.generic]) -> None:
    """Raise ``DataError`` for a column without one entry a row."""
    for name, column in columns.items():
        if column.shape != (num_rows,):
            raise DataError(f"{name}: should have shape ({num_rows},), not {column.shape}")


def _binary_rows(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    liked, values = read_numbers("labels", labels, low=0, high=1), read_numbers("scores", scores)
    if not np.isin(liked, (0, 1)).all():
        raise DataError("labels: should be 0 or 1, not between")
    check_lengths(len(liked), scores=values)
    return liked, values


def _probability_rows(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats]:
    target = read_numbers("labels", labels, low=0, high=1)
    share = read_numbers("probabilities", probabilities, low=0, high=1)
    check_lengths(len(target), probabilities=share)
    return target, share


def _mean_over_members(codes: Ints, values: Floats, defined: NDArray[np.bool_]) -> WeightedMetric:
    """Average one value a member, weighted as the member's first row (all of them weigh alike)."""
    first = np.unique(codes, return_index=True)[1]

    def weighted(weights: Floats) -> float:
        kept = weights[first] * defined
        return _divide(kept @ values, kept.sum())

    return weighted


def _positions(codes: Ints, values: Floats) -> Ints:
    """Rank every row inside its member, from 0 for the smallest value."""
    positions = np.empty_like(codes)
    positions[np.lexsort((values, codes))] = np.arange(len(codes))
    sizes = np.bincount(codes)
    return positions - (np.cumsum(sizes) - sizes)[codes]


def _mean_over_ties(codes: Ints, values: Floats, numbers: NDArray[np.number]) -> Floats:
    """Give the rows of one member and one value the mean of their numbers."""
    value_codes = np.unique(values, return_inverse=True)[1]
    ties = np.unique(codes * len(codes) + value_codes, return_inverse=True)[1]
    means: Floats = np.bincount(ties, numbers) / np.bincount(ties)
    return means[ties]


def _discounts(positions: Ints, k: int) -> Floats:
    return np.where(positions < k, 1 / np.log2(positions + 2), 0.0)


def _divide(numerator: SupportsFloat, denominator: SupportsFloat) -> float:
    return float(numerator) / float(denominator) if float(denominator) else np.nan
