"""Rankers without a language model, to be beaten on the same rows.

Each takes (train, items, rows) and gives P(liked) for every row. What it has to choose, it chooses
on a split of the train rows by time: the later fifth plays the rows to be scored.

    train, rows   user_id, item_id, label, timestamp (s), history_ids; labels of rows are not read
    items         item_id, title, genres
"""

from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rankonce.datasets.boosted_trees import fit_trees
from rankonce.datasets.movie_columns import past_features
from rankonce.datasets.statistics import read_labels, read_whole_numbers, statistics_from
from rankonce.errors import DataError
from rankonce.evaluation.metrics import log_loss
from rankonce.prompts.features import Floats, log_odds, smoothed_share

Baseline = Callable[[pl.DataFrame, pl.DataFrame, pl.DataFrame], Floats]

_STRENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_EARLY_SHARE = 0.8


def score_by_item_mean(train: pl.DataFrame, items: pl.DataFrame, rows: pl.DataFrame) -> Floats:
    """Score a row by its item's share of likes, shrunk to the share of all train rows.

    The prior's strength is the one of least log-loss on the later fifth of train.

    Returns:
        P(liked), one a row, in (0, 1).

    Raises:
        DataError: a column is missing, or all train rows have one timestamp.
    """
    return _choose_by_time(_item_share, [(strength,) for strength in _STRENGTHS], train, rows)


def score_by_item_and_user_mean(
    train: pl.DataFrame, items: pl.DataFrame, rows: pl.DataFrame
) -> Floats:
    """Score a row by its item's and its user's share of likes, added as log-odds.

    log-odds = item + user - all: both deviations from the mean count in full, and the sum stays a
    probability. The two strengths are those of least log-loss on the later fifth of train.

    Returns:
        P(liked), one a row, in (0, 1).

    Raises:
        DataError: a column is missing, or all train rows have one timestamp.
    """
    return _choose_by_time(_item_and_user_share, list(product(_STRENGTHS, _STRENGTHS)), train, rows)


def score_by_lightgbm(train: pl.DataFrame, items: pl.DataFrame, rows: pl.DataFrame) -> Floats:
    """Score a row by boosted trees over ``past_features`` (LightGBM: Ke et al., 2017).

    A train row's features come from the train rows before it, those of the rows to be scored from
    all of train. The number of trees is the one of least log-loss on the later fifth of train;
    then all train rows are fitted with it. The seed is fixed.

    Returns:
        P(liked), one a row, in (0, 1).

    Raises:
        DataError: a column is missing, or all train rows have one timestamp.
        MissingDependencyError: LightGBM is not installed.
    """
    columns, labels = past_features(train, items, train).to_numpy(), read_labels(train)
    predict = fit_trees(columns, labels, early_R=_is_early(train))
    return predict(past_features(train, items, rows).to_numpy())[:, 1]


BASELINES: Mapping[str, Baseline] = {
    "item mean": score_by_item_mean,
    "item mean + user mean": score_by_item_and_user_mean,
    "LightGBM": score_by_lightgbm,
}


def _item_share(counts: pl.DataFrame, strength: float) -> Floats:
    return smoothed_share(
        counts["item_likes"].to_numpy(),
        counts["item_count"].to_numpy(),
        prior=counts["global_share"].to_numpy(),
        strength=strength,
    )


def _item_and_user_share(
    counts: pl.DataFrame, item_strength: float, user_strength: float
) -> Floats:
    prior = counts["global_share"].to_numpy()
    user_share = smoothed_share(
        counts["user_likes"].to_numpy(),
        counts["user_count"].to_numpy(),
        prior=prior,
        strength=user_strength,
    )
    item_share = _item_share(counts, item_strength)
    share: Floats = 1 / (1 + np.exp(log_odds(prior) - log_odds(item_share) - log_odds(user_share)))
    return share


def _choose_by_time(
    share: Callable[..., Floats],
    strengths: list[tuple[float, ...]],
    train: pl.DataFrame,
    rows: pl.DataFrame,
) -> Floats:
    """Apply the share with the strengths that predict the later train rows best."""
    early = _is_early(train)
    late_rows = train.filter(~early)
    counts, late_labels = statistics_from(train.filter(early), late_rows), read_labels(late_rows)
    best = min(strengths, key=lambda chosen: log_loss(late_labels, share(counts, *chosen)))
    return share(statistics_from(train, rows), *best)


def _is_early(train: pl.DataFrame) -> NDArray[np.bool_]:
    """Mark the earlier four fifths of the train rows; one moment is never split."""
    moments = read_whole_numbers(train, "timestamp")
    if len(np.unique(moments)) < 2:
        raise DataError("timestamp: train rows should have at least two moments, to split by time")
    # A first moment that holds more than four fifths is early by itself.
    cut = max(np.sort(moments)[int(_EARLY_SHARE * len(moments))], np.unique(moments)[1])
    early: NDArray[np.bool_] = moments < cut
    return early
