"""Fit calibrations on labelled requests, and measure them on others.

Whole groups (requests, or the members that rows are of) are held out, so that nobody's labels are
on both sides. What is stored is the function that was measured.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankonce.calibration import (
    Calibration,
    Floats,
    Method,
    relevance_logits,
    scaled_grades,
)
from rankonce.errors import DataError, MissingDependencyError
from rankonce.evaluation.metrics import expected_calibration_error, log_loss
from rankonce.prompts.tasks import Task
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample

# Slopes below give every candidate nearly the same probability.
_SMALLEST_SLOPE = 1e-4


@dataclass(frozen=True, kw_only=True)
class ScoredLabels:
    """Candidates of a task whose label is known.

    Attributes:
        logits_N: log-odds of the scaled ranking value, the model's own.
        targets_N: the worth of the label, 0..1.
        groups_N: the group of each.
    """

    logits_N: Floats
    targets_N: Floats
    groups_N: NDArray[np.int64]

    def part(self, chosen_N: NDArray[np.bool_]) -> "ScoredLabels":
        """Return the candidates that are chosen."""
        return ScoredLabels(
            logits_N=self.logits_N[chosen_N],
            targets_N=self.targets_N[chosen_N],
            groups_N=self.groups_N[chosen_N],
        )


def score_labels(
    ranker: Ranker, examples: Sequence[TrainingExample], groups: Sequence[Hashable] | None = None
) -> dict[str, ScoredLabels]:
    """Score labelled requests, with a progress bar on stderr.

    Args:
        ranker: without calibrations of its own.
        groups: what each request belongs to; itself by default.

    Returns:
        By task, its labelled candidates.

    Raises:
        DataError: a label is not one of its task's.
    """
    numbers: dict[Hashable, int] = {}
    rows: dict[str, list[tuple[list[float], float, int]]] = {}
    results = ranker.score_many([example.request for example in examples])
    for place, (example, result) in enumerate(zip(examples, results, strict=True)):
        task = ranker.tasks[result.task]
        group = numbers.setdefault(place if groups is None else groups[place], len(numbers))
        for label, candidate in zip(example.labels, result.candidates, strict=True):
            if label is not None:
                shares = {label: 1.0} if isinstance(label, str) else label
                target = _worth(task, shares)
                row = [candidate.log_probs[name] for name in task.label_names]
                rows.setdefault(task.name, []).append((row, target, group))
    return {
        name: ScoredLabels(
            logits_N=relevance_logits(
                np.array([row for row, _, _ in found]), scaled_grades(ranker.tasks[name])
            ),
            targets_N=np.array([target for _, target, _ in found]),
            groups_N=np.array([group for _, _, group in found]),
        )
        for name, found in rows.items()
    }


def calibrate_task(
    scored: ScoredLabels, *, method: Method, held_out: float = 0.3, seed: int = 0
) -> Calibration:
    """Fit a task's calibration on a part of the groups and measure it on the others.

    Args:
        held_out: share of the groups that is measured on.
        seed: draws them.

    Returns:
        The calibration; ``measured`` has the rows of both parts, and log-loss and calibration error
        of the held-out ones before and after.

    Raises:
        DataError: there are too few groups or labels, or the labels do not rise with the score.
    """
    groups = np.unique(scored.groups_N)
    num_held_out = round(held_out * len(groups))
    if not 0 < num_held_out < len(groups):
        raise DataError(
            f"data: should hold requests enough to fit on some and measure on others, holds "
            f"{len(groups)}"
        )
    chosen = np.random.default_rng(seed).permutation(groups)[:num_held_out]
    is_held_out_N = np.isin(scored.groups_N, chosen)
    fitted_on, measured_on = scored.part(~is_held_out_N), scored.part(is_held_out_N)
    calibration = fit_calibration(fitted_on.logits_N, fitted_on.targets_N, method=method)
    before = _measure(measured_on.targets_N, measured_on.logits_N)
    after = _measure(measured_on.targets_N, calibration.apply(measured_on.logits_N))
    measured = {
        "num_fitted": float(len(fitted_on.targets_N)),
        "num_held_out": float(len(measured_on.targets_N)),
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
    }
    return calibration.model_copy(update={"measured": measured})


def fit_calibration(logits_N: Floats, targets_N: Floats, *, method: Method) -> Calibration:
    """Fit one rising function of log-odds to labels in 0..1.

    Temperature and Platt scaling minimise the log-loss (with Platt's targets, which are a little
    less than sure); isotonic regression the squared error, kept from 0 and 1 by Laplace's rule.

    Raises:
        DataError: the labels are all alike, or fall with the score.
    """
    if len(np.unique(targets_N)) < 2:
        raise DataError("labels: should be of two kinds at least, to be calibrated on")
    if method == "isotonic":
        return _fit_isotonic(logits_N, targets_N)
    slope, offset = _fit_line(logits_N, targets_N, with_offset=method == "platt")
    return Calibration(method=method, slope=slope, offset=offset)


def _fit_line(logits_N: Floats, targets_N: Floats, *, with_offset: bool) -> tuple[float, float]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingDependencyError("scipy", extra="eval") from error

    if with_offset:
        up, down = targets_N.sum(), (1 - targets_N).sum()
        targets_N = targets_N * (up + 1) / (up + 2) + (1 - targets_N) / (down + 2)

    def loss(line: Floats) -> tuple[float, Floats]:
        moved_N = line[0] * logits_N + line[1]
        value = float(np.mean(np.logaddexp(0.0, moved_N) - targets_N * moved_N))
        slopes_N = np.exp(-np.logaddexp(0.0, -moved_N)) - targets_N
        return value, np.array([np.mean(slopes_N * logits_N), np.mean(slopes_N)])

    bounds = [(_SMALLEST_SLOPE, None), (None, None) if with_offset else (0.0, 0.0)]
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=bounds, method="L-BFGS-B")
    slope, offset = (float(value) for value in found.x)
    if slope <= _SMALLEST_SLOPE:
        raise DataError(_FALLING)
    return slope, offset


def _fit_isotonic(logits_N: Floats, targets_N: Floats) -> Calibration:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", extra="eval") from error

    edge = 1 / (len(targets_N) + 2)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip")
    model.fit(logits_N, targets_N)
    knots = list(zip(model.X_thresholds_.tolist(), model.y_thresholds_.tolist(), strict=True))
    if knots[0][1] == knots[-1][1]:
        raise DataError(_FALLING)
    return Calibration(method="isotonic", knots=tuple(knots))


_FALLING = (
    "labels: should rise with the score, but fall or do not depend on it; a calibration keeps the "
    "order, so it cannot help"
)


def _measure(targets_N: Floats, logits_N: Floats) -> dict[str, float]:
    shares_N = np.exp(-np.logaddexp(0.0, -logits_N))
    return {
        "log_loss": log_loss(targets_N, shares_N),
        "calibration_error": expected_calibration_error(targets_N, shares_N),
    }


def _worth(task: Task, shares: Mapping[str, float]) -> float:
    if not set(shares) <= set(task.label_names):
        raise DataError(f"labels: should be of {', '.join(task.label_names)}, is {shares!r}")
    grades = dict(zip(task.label_names, scaled_grades(task).tolist(), strict=True))
    return float(sum(grades[name] * share for name, share in shares.items()))
