"""Pictures that an experiment's file declares: one column against another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankonce.distillation.experiments.declaration import Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NUMBER = (int, float)
_SHOWN = (int, float, str)


def draw_plot(
    path: Path, plot: Plot, rows: Sequence[Mapping[str, Any]], *, grid: Sequence[str] = ()
) -> "Figure":
    """Draw means over equal x with their standard deviation, a line for every value of ``by``.

    Words on x, such as names of runs, stand in the order of the rows.

    Args:
        path: what is written, and drawn at 120 points an inch.
        rows: those that finished; at least one with a number on y.
        grid: columns that hold the settings, by which ``plot.against`` is found.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[Any, dict[float | str, list[float]]] = {}

    def setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in grid)

    zeros = {setting(row): row.get(plot.y) for row in rows if row["run"] == plot.against}
    for row in rows:
        x, y = row.get(plot.x), row.get(plot.y)
        zero = 0.0 if plot.against is None else zeros.get(setting(row))
        is_shown = not plot.runs or row["run"] in plot.runs
        if (
            is_shown
            and isinstance(x, _SHOWN)
            and isinstance(y, _NUMBER)
            and isinstance(zero, _NUMBER)
        ):
            lines.setdefault(row.get(plot.by), {}).setdefault(x, []).append(y - zero)
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
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y if plot.against is None else f"{plot.y}, less that of {plot.against}")
    axes.set_title(plot.title or plot.name)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    return figure
