"""Metrics of the suite: what a task measures, in tables of one row a labelled candidate.

A task that ranks by one label is binary: that label against all others. A task that ranks by the
expected grade is graded. N rows, L labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rankonce.errors import DataError
from rankonce.evaluation.metrics import Estimate, bootstrap
from rankonce.evaluation.suite_data import SuiteRequest
from rankonce.evaluation.weighted_metrics import (
    WeightedMetric,
    exponential_gains,
    weighted_auc,
    weighted_calibration_error,
    weighted_entropy,
    weighted_log_loss,
    weighted_ndcg,
    weighted_uauc,
)
from rankonce.prompts.features import Floats, Ints
from rankonce.prompts.tasks import Task

_SMALLEST_PROBABILITY = 1e-15
_MOST_BINS, _LEAST_IN_BIN = 10, 30


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one ranker says of the rows.

    Attributes:
        probabilities_NL: of the labels.
        values_N: what candidates are ordered by.
    """

    probabilities_NL: Floats
    values_N: Floats

    def take(self, rows_N: NDArray[np.bool_]) -> "Scores":
        """Take some of the rows."""
        return Scores(
            probabilities_NL=self.probabilities_NL[rows_N], values_N=self.values_N[rows_N]
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The labelled candidates of a task's requests.

    Attributes:
        labels_N: the label's place among the task's.
        members_N: names, whose rows the bootstrap draws together.
        requests_N: the number of the row's request.
        places_N: the candidate's place in its request, from 0.
        histories_N: events that the member had before.
    """

    task: Task
    labels_N: Ints
    members_N: NDArray[np.str_]
    requests_N: Ints
    places_N: Ints
    histories_N: Ints

    def take(self, rows_N: NDArray[np.bool_]) -> "Rows":
        """Take some of the rows."""
        names = ("labels_N", "members_N", "requests_N", "places_N", "histories_N")
        return replace(self, **{name: getattr(self, name)[rows_N] for name in names})

    @property
    def grades(self) -> Floats:
        """The labels' grades, N; those of a binary task are 1 for the label it ranks by, else 0."""
        return np.array(self.task.grades)[self.labels_N]


def is_graded(task: Task) -> bool:
    """Whether a task ranks by the expected grade and not by one label."""
    return task.ranking.kind == "expected_grade"


def main_metric(task: Task) -> str:
    """The metric that buckets, arms and plots show: how often the better candidate ranks first."""
    return "concordance" if is_graded(task) else "auc"


def read_rows(task: Task, requests: Sequence[SuiteRequest]) -> Rows:
    """Make a row of every candidate whose label is known.

    Raises:
        DataError: a label is no name of the task's, or no candidate has one.
    """
    rows: list[tuple[int, str, int, int, int]] = []
    for number, one in enumerate(requests):
        for place, label in enumerate(one.example.labels):
            if label is None:
                continue
            if not isinstance(label, str) or label not in task.label_names:
                raise DataError(
                    f"labels[{place}]: should be one of {', '.join(task.label_names)} to be "
                    f"measured, is {label!r} (request {one.example.request.id or number})"
                )
            code = task.label_names.index(label)
            length = len(one.whole_history)
            rows.append((code, one.member, number, place, length))
    if not rows:
        raise DataError(f"{task.name}: no candidate has a label")
    labels, members, numbers, places, lengths = zip(*rows, strict=True)
    return Rows(
        task=task,
        labels_N=np.array(labels, dtype=np.int64),
        members_N=np.array(members),
        requests_N=np.array(numbers, dtype=np.int64),
        places_N=np.array(places, dtype=np.int64),
        histories_N=np.array(lengths, dtype=np.int64),
    )


def scores_of(rows: Rows, answers: Sequence[Sequence[Mapping[str, float]]]) -> Scores:
    """Take the rows' scores from P(label) of every candidate, request by request."""
    names = rows.task.label_names
    probabilities = np.array(
        [
            [answers[number][place][name] for name in names]
            for number, place in zip(rows.requests_N.tolist(), rows.places_N.tolist(), strict=True)
        ]
    )
    safe = np.log(np.maximum(probabilities, _SMALLEST_PROBABILITY)).tolist()
    values = [rows.task.ranking_value(dict(zip(names, row, strict=True))) for row in safe]
    return Scores(probabilities_NL=probabilities, values_N=np.array(values))


def weighted_metrics(rows: Rows, scores: Scores) -> dict[str, WeightedMetric]:
    """Prepare every metric that fits the task, by its name."""
    if is_graded(rows.task):
        return _graded_metrics(rows, scores)
    liked, members = rows.grades, rows.members_N
    asked = rows.task.label_names.index(str(rows.task.ranking.label))
    share = np.clip(scores.probabilities_NL[:, asked], 0.0, 1.0)
    return {
        "auc": weighted_auc(liked, scores.values_N),
        "uauc": weighted_uauc(liked, scores.values_N, members),
        "ndcg@10": weighted_ndcg(liked, scores.values_N, rows.requests_N, k=10),
        "log_loss": weighted_log_loss(liked, share),
        "normalised_entropy": weighted_entropy(liked, share),
        "calibration_error": weighted_calibration_error(liked, share),
    }


def _graded_metrics(rows: Rows, scores: Scores) -> dict[str, WeightedMetric]:
    known = np.arange(len(rows.labels_N))
    share = np.clip(scores.probabilities_NL, _SMALLEST_PROBABILITY, 1.0)
    losses = -np.log(share[known, rows.labels_N])
    best = scores.probabilities_NL.argmax(axis=1)
    hits = (best == rows.labels_N).astype(np.float64)
    chosen = np.eye(len(rows.task.label_names))[rows.labels_N]

    def loss(weights: Floats) -> float:
        return float(weights @ losses / weights.sum())

    def entropy(weights: Floats) -> float:
        shares = weights @ chosen / weights.sum()
        base = -float(shares @ np.log(np.where(shares > 0, shares, 1.0)))
        return loss(weights) / base if base else np.nan

    gains = exponential_gains(rows.grades)
    return {
        "concordance": weighted_concordance(rows.grades, scores.values_N, rows.requests_N),
        "accuracy": lambda weights: float(weights @ hits / weights.sum()),
        "ndcg@10": weighted_ndcg(gains, scores.values_N, rows.requests_N, k=10),
        "log_loss": loss,
        "normalised_entropy": entropy,
        # Of the most probable label: how far its probability is from how often it is right.
        "calibration_error": weighted_calibration_error(hits, np.minimum(share[known, best], 1.0)),
    }


def weighted_concordance(grades_N: Floats, values_N: Floats, groups_N: Ints) -> WeightedMetric:
    """Prepare the share of pairs of one group and two grades that stand in the right order.

    Equal values count half, so that 0.5 is blind and 1 right (Goodman, Kruskal, 1954, as a share).

    Returns:
        A function of the rows' weights; nan where no group has two grades. The rows of a group
        weigh alike.
    """
    codes = np.unique(groups_N, return_inverse=True)[1]
    first = np.unique(codes, return_index=True)[1]
    won, pairs = np.zeros(len(first)), np.zeros(len(first))
    for code in range(len(first)):
        rows = codes == code
        better = grades_N[rows][:, None] > grades_N[rows][None, :]
        ahead = np.sign(values_N[rows][:, None] - values_N[rows][None, :])
        won[code] = ((1 + ahead) / 2)[better].sum()
        pairs[code] = better.sum()

    def weighted(weights: Floats) -> float:
        total = weights[first] @ pairs
        return float(weights[first] @ won / total) if total else np.nan

    return weighted


def estimate_all(
    rows: Rows, scores: Scores, *, num_resamples: int, seed: int
) -> dict[str, Estimate]:
    """Estimate every metric of the task with its standard error over members."""
    return {
        name: _over_members(weighted, rows, num_resamples=num_resamples, seed=seed)
        for name, weighted in weighted_metrics(rows, scores).items()
    }


def estimate_main(rows: Rows, scores: Scores, *, num_resamples: int, seed: int) -> Estimate:
    """Estimate the task's main metric."""
    weighted = weighted_metrics(rows, scores)[main_metric(rows.task)]
    return _over_members(weighted, rows, num_resamples=num_resamples, seed=seed)


def estimate_difference(
    rows: Rows, scores: Scores, others: Scores, *, num_resamples: int, seed: int
) -> Estimate:
    """Estimate how much better the main metric is than with other scores of the same rows."""
    name = main_metric(rows.task)
    first, second = (weighted_metrics(rows, one)[name] for one in (scores, others))
    return _over_members(
        lambda weights: first(weights) - second(weights),
        rows,
        num_resamples=num_resamples,
        seed=seed,
    )


def _over_members(
    weighted: WeightedMetric, rows: Rows, *, num_resamples: int, seed: int
) -> Estimate:
    found = bootstrap(weighted, rows.members_N, num_resamples=num_resamples, seed=seed)
    if len(set(rows.members_N.tolist())) > 1:
        return found
    # One member can only be drawn again and again, which tells nothing of the spread.
    return Estimate(value=found.value, standard_error=np.nan, low=np.nan, high=np.nan)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Average estimates of several tasks, those that are not defined left out.

    Their errors add as if the tasks had been drawn apart.
    """
    known = [one for one in estimates if not math.isnan(one.value)]
    errors = [0.0 if math.isnan(one.standard_error) else one.standard_error for one in known]
    value = float(np.mean([one.value for one in known])) if known else math.nan
    error = math.hypot(*errors) / max(1, len(known))
    low, high = value - 1.96 * error, value + 1.96 * error
    return Estimate(value=value, standard_error=error, low=low, high=high)


BUCKET_KINDS = (
    "events in the history",
    "number of candidates",
    "place in the list",
    "what is known of the member",
    "what is known of the candidate",
)
# The main metric of fewer rows is mostly luck, and an average over tasks would count it in full.
_LEAST_IN_BUCKET = 20
Buckets = dict[str, dict[str, NDArray[np.bool_]]]


def bucket_rows(rows: Rows, requests: Sequence[SuiteRequest]) -> Buckets:
    """Give the rows of every bucket, by kind and name; a kind with one bucket alone is left out.

    So are buckets of fewer than 20 rows. Places count where a list was shown, which only a
    simulator knows; so does who is new.
    """
    candidates = np.array([len(one.example.request.candidates) for one in requests])
    events, numbers, places, member, candidate = BUCKET_KINDS
    kinds: Buckets = {
        events: _ranges(rows.histories_N, (0, 5, 10, 100)),
        numbers: _ranges(candidates[rows.requests_N], (1, 5, 10, 50)),
    }
    if all(one.truth is not None for one in requests):
        kinds[places] = _ranges(rows.places_N + 1, (3, 6))
    if all(one.is_new_member is not None for one in requests):
        new = np.array([bool(one.is_new_member) for one in requests])[rows.requests_N]
        kinds[member] = {"nothing": new, "something": ~new}
    if all(one.new_candidates is not None for one in requests):
        pairs = zip(rows.requests_N.tolist(), rows.places_N.tolist(), strict=True)
        fresh = np.array([(requests[i].new_candidates or ())[place] for i, place in pairs])
        kinds[candidate] = {"nothing": fresh, "something": ~fresh}
    filled = {
        kind: {name: rows_N for name, rows_N in buckets.items() if rows_N.any()}
        for kind, buckets in kinds.items()
    }
    return {
        kind: {name: rows_N for name, rows_N in buckets.items() if rows_N.sum() >= _LEAST_IN_BUCKET}
        for kind, buckets in filled.items()
        if len(buckets) > 1
    }


def reliability(rows: Rows, scores: Scores) -> list[tuple[float, float, int]]:
    """Compare probabilities with what came of them, in bins of equal mass.

    Returns:
        Mean probability, share of rows and their number for each bin: of the label that a binary
        task ranks by, or of a graded task's most probable label.
    """
    if is_graded(rows.task):
        best = scores.probabilities_NL.argmax(axis=1)
        share, came = scores.probabilities_NL.max(axis=1), (best == rows.labels_N).astype(float)
    else:
        asked = rows.task.label_names.index(str(rows.task.ranking.label))
        share, came = scores.probabilities_NL[:, asked], rows.grades
    num_bins = min(_MOST_BINS, max(1, len(share) // _LEAST_IN_BIN))
    bins = np.array_split(np.argsort(share, kind="stable"), num_bins)
    return [(float(share[one].mean()), float(came[one].mean()), len(one)) for one in bins]


def _ranges(values_N: Ints, ends: Sequence[int]) -> dict[str, NDArray[np.bool_]]:
    """Sort values from 0 into the ranges that end with, and after, the given ones."""
    low = 0 if ends[0] == 0 else 1
    names = []
    for end in ends:
        names.append(str(end) if low == end else f"{low}–{end}")
        low = end + 1
    places = np.searchsorted(ends, values_N)
    return {name: places == place for place, name in enumerate([*names, f">{ends[-1]}"])}
