"""Pictures that an experiment's file declares: one column against another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankonce.distillation.experiments.declaration import Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plot(path: Path, plot: Plot, rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw means over equal x with their standard deviation, a line for every value of ``by``.

    Words on x, such as names of runs, stand in the order of the rows.

    Args:
        path: what is written, and drawn at 120 points an inch.
        rows: those that finished; at least one with a number on y.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[Any, dict[float | str, list[float]]] = {}
    for row in rows:
        x, y = row.get(plot.x), row.get(plot.y)
        if isinstance(x, int | float | str) and isinstance(y, int | float):
            lines.setdefault(row.get(plot.by), {}).setdefault(x, []).append(y)
    for label, points in lines.items():
        places = list(points)
        if not any(isinstance(place, str) for place in places):
            places.sort()
        means = [float(np.mean(points[place])) for place in places]
        spreads = [
            float(np.std(points[place], ddof=1)) if len(points[place]) > 1 else 0.0
            for place in places
        ]
        axes.errorbar(places, means, yerr=spreads, marker="o", capsize=3, label=str(label))
        if any(isinstance(place, str) for place in places):
            axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_title(plot.title or plot.name)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    return figure
