"""Score the rows of a dataset with the ranker that serves, and put metrics beside baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rankonce.datasets.movielens import MovieRows, movie_examples, movie_rows
from rankonce.datasets.statistics import read_labels, read_whole_numbers
from rankonce.errors import DataError
from rankonce.evaluation.baselines import BASELINES
from rankonce.evaluation.metrics import (
    bootstrap_over_members,
    cold_buckets,
    distinct_score_ratio,
    paired_bootstrap_over_members,
)
from rankonce.evaluation.report import EvaluationRow
from rankonce.prompts.features import Floats
from rankonce.ranker import Ranker

_METRICS = (
    "auc",
    "uauc",
    "ndcg@10",
    "log_loss",
    "normalised_entropy",
    "expected_calibration_error",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rankers side by side on the same rows.

    Attributes:
        rows: one a ranker: metrics with standard errors over members. After several runs of one
            recipe their mean, whose ± is the standard deviation between runs.
        cold: one a ranker: AUC by the number of films in the row's history.
        differences: for each run and baseline, the run's AUC minus the baseline's with the standard
            error of the paired difference.
        tokens: what the first run read, and what one prompt per row would have cost.
        labels: of the rows.
        scores: P(liked) of the rows, by ranker.
    """

    rows: Sequence[EvaluationRow]
    cold: Sequence[EvaluationRow]
    differences: Sequence[EvaluationRow]
    tokens: dict[str, int]
    labels: Floats
    scores: Mapping[str, Floats]


def evaluate_movies(
    rankers: Mapping[str, Ranker],
    *,
    train: pl.DataFrame,
    items: pl.DataFrame,
    data: pl.DataFrame,
    num_resamples: int = 200,
) -> Evaluation:
    """Evaluate a ranker, or several runs of one recipe, and the baselines on likes and dislikes.

    Statistics of members and films come from the train rows alone, for every ranker alike; every
    row has its own history.

    Args:
        rankers: by name, one at least.
        train, data: user_id, item_id, label, timestamp, history_ids.
        items: item_id, title, genres.

    Raises:
        DataError: a column is missing, or there is no row.
    """
    labels = read_labels(data)
    if not len(labels):
        raise DataError("data: should hold at least one row")
    movies = movie_rows(data, items, train=train)
    # The baselines first: they take seconds, and one may lack its library.
    baselines = {key: score(train, items, data) for key, score in BASELINES.items()}
    scored = {name: score_rows(ranker, movies) for name, ranker in rankers.items()}
    runs = {name: scores for name, (scores, _) in scored.items()}
    by_name = {**runs, **baselines}
    members = read_whole_numbers(data, "user_id")
    lengths = data["history_ids"].list.len().fill_null(0).to_numpy()
    rows = [_measure(key, labels, p, members, num_resamples) for key, p in by_name.items()]
    if len(runs) > 1:
        rows.insert(len(runs), _mean_of_runs(rows[: len(runs)]))
    return Evaluation(
        rows=rows,
        cold=[_measure_cold(key, labels, p, lengths) for key, p in by_name.items()],
        differences=[
            _compare(f"{name}: AUC against {key}", labels, scores, p, members, num_resamples)
            for name, scores in runs.items()
            for key, p in baselines.items()
        ],
        tokens=next(iter(scored.values()))[1],
        labels=labels.astype(np.float64),
        scores=by_name,
    )


def _mean_of_runs(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    values = {name: [row.metrics[name] for row in rows] for name in rows[0].metrics}
    return EvaluationRow(
        name=f"mean of {len(rows)} runs",
        metrics={name: float(np.mean(numbers)) for name, numbers in values.items()},
        standard_errors={name: float(np.std(numbers, ddof=1)) for name, numbers in values.items()},
    )


def score_rows(ranker: Ranker, movies: MovieRows) -> tuple[Floats, dict[str, int]]:
    """Score every row with its own history: P(Yes) in the rows' order, and the tokens it took."""
    examples = list(movie_examples(movies, candidates_per_example=500, shared_history=False))
    probabilities = np.full(movies.rows.height, np.nan)
    tokens = {"computed_tokens": 0, "separate_tokens": 0}
    for result in ranker.score_many([example.request for example in examples]):
        for candidate in result.candidates:
            probabilities[int(str(candidate.id))] = np.exp(candidate.log_probs["Yes"])
        tokens["computed_tokens"] += result.usage.computed_tokens
        tokens["separate_tokens"] += result.usage.separate_tokens
    return probabilities, tokens


def _measure(
    name: str, labels: np.ndarray, scores: Floats, members: np.ndarray, num_resamples: int
) -> EvaluationRow:
    estimates = {
        metric: bootstrap_over_members(metric, labels, scores, members, num_resamples=num_resamples)
        for metric in _METRICS
    }
    return EvaluationRow(
        name=name,
        metrics={
            **{metric: estimate.value for metric, estimate in estimates.items()},
            "distinct_score_ratio": distinct_score_ratio(scores),
        },
        standard_errors={m: estimate.standard_error for m, estimate in estimates.items()},
    )


def _measure_cold(
    name: str, labels: np.ndarray, scores: Floats, lengths: np.ndarray
) -> EvaluationRow:
    buckets = cold_buckets(labels, scores, lengths)
    return EvaluationRow(
        name=name,
        metrics={f"AUC {b.history_length} events ({b.count} rows)": b.auc for b in buckets},
    )


def _compare(
    name: str,
    labels: np.ndarray,
    scores: Floats,
    others: Floats,
    members: np.ndarray,
    num_resamples: int,
) -> EvaluationRow:
    estimate = paired_bootstrap_over_members(
        "auc", labels, scores, others, members, num_resamples=num_resamples
    )
    return EvaluationRow(
        name=name,
        metrics={"difference": estimate.value, "low": estimate.low, "high": estimate.high},
        standard_errors={"difference": estimate.standard_error},
    )
