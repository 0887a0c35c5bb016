"""Pictures that an experiment's file declares: one column against another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankonce.distillation.experiments.plan import Plot


def draw_plot(path: Path, plot: Plot, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw means over equal x with their standard deviation, a line for every value of ``by``.

    Args:
        rows: those that finished; at least one with numbers in both columns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[Any, dict[float, list[float]]] = {}
    for row in rows:
        x, y = row.get(plot.x), row.get(plot.y)
        if isinstance(x, int | float) and isinstance(y, int | float):
            lines.setdefault(row.get(plot.by), {}).setdefault(x, []).append(y)
    for label, points in lines.items():
        places = sorted(points)
        means = [float(np.mean(points[place])) for place in places]
        spreads = [
            float(np.std(points[place], ddof=1)) if len(points[place]) > 1 else 0.0
            for place in places
        ]
        axes.errorbar(places, means, yerr=spreads, marker="o", capsize=3, label=str(label))
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_title(plot.title or plot.name)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
