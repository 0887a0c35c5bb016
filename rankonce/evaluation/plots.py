"""Plots of an evaluation: calibration of every ranker, and AUC by the length of the history."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rankonce.errors import DataError, MissingDependencyError
from rankonce.evaluation.report import EvaluationRow
from rankonce.prompts.features import Floats

_NUM_BINS = 10
_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Make sure that a plot can be drawn, before anything long is computed for it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        DataError: the suffix names no format.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="bench") from error
    if path.suffix not in _FORMATS:
        raise DataError(f"plot: should end in {', '.join(_FORMATS)}, is {path.name}")


def plot_evaluation(
    path: Path, labels: Floats, scores: Mapping[str, Floats], cold: Sequence[EvaluationRow]
) -> None:
    """Draw mean label against mean probability in bins of equal mass, and AUC by history length.

    Args:
        path: the picture; its suffix names the format (.png, .svg, .pdf).
        labels: 0 or 1 a row.
        scores: P(liked) a row, by ranker.
        cold: AUC by history length, by ranker.

    Raises:
        MissingDependencyError, DataError: as ``check_plot``.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    calibration, by_history = figure.subplots(1, 2)
    calibration.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, probabilities in scores.items():
        bins = np.array_split(np.argsort(probabilities, kind="stable"), _NUM_BINS)
        bins = [rows for rows in bins if len(rows)]
        calibration.plot(
            [probabilities[rows].mean() for rows in bins],
            [labels[rows].mean() for rows in bins],
            marker="o",
            markersize=4,
            label=name,
        )
    calibration.set(xlabel="mean P(Yes)", ylabel="part of rows liked", title="Calibration")
    calibration.legend()
    for row in cold:
        places = [p for p, value in enumerate(row.metrics.values()) if not math.isnan(value)]
        values = list(row.metrics.values())
        by_history.plot(
            places, [values[p] for p in places], marker="o", markersize=4, label=row.name
        )
    names = list(cold[0].metrics) if cold else []
    by_history.set_xticks(range(len(names)), [name.removeprefix("AUC ") for name in names])
    by_history.tick_params(axis="x", labelrotation=20, labelsize=8)
    by_history.set(ylabel="AUC", title="AUC by length of the history")
    figure.savefig(path, dpi=120)
