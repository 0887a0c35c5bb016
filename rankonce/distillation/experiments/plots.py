"""Pictures that an experiment's file declares: one column against another."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankonce.distillation.experiments.declaration import Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NUMBER = (int, float)
_SHOWN = (int, float, str)


def draw_plot(
    path: Path,
    plot: Plot,
    rows: Sequence[Mapping[str, Any]],
    *,
    grid: Sequence[str] = (),
    measured: Collection[str] = (),
) -> "Figure":
    """Draw means over equal x with their standard deviation, a line for every value of ``by``.

    Where x is measured, no two rows have the same: a point is then the mean over the seeds of a run
    in both directions. Words on x, such as names of runs, stand in the order of the rows.

    Args:
        path: what is written, and drawn at 120 points an inch.
        rows: those that finished; at least one with a number on y.
        grid: columns that hold the settings, by which ``plot.against`` is found.
        measured: columns that hold what was measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[Any, dict[Any, list[tuple[Any, float]]]] = {}

    def setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in grid)

    def place(row: Mapping[str, Any]) -> Any:
        if plot.x not in measured:
            return row[plot.x]
        return (row["run"], *(row[name] for name in grid if name != "seed"))

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
            points = lines.setdefault(row.get(plot.by), {})
            points.setdefault(place(row), []).append((x, y - zero))
    for label, points in lines.items():
        groups = [tuple(zip(*group, strict=True)) for group in points.values()]
        if has_words := any(isinstance(x, str) for xs, _ in groups for x in xs):
            places = [xs[0] for xs, _ in groups]
        else:
            groups.sort(key=lambda group: np.mean(group[0]))
            places = [np.mean(xs) for xs, _ in groups]
        across = [_spread(xs) for xs, _ in groups] if plot.x in measured else None
        means, spreads = ([of(ys) for _, ys in groups] for of in (np.mean, _spread))
        axes.errorbar(
            places, means, xerr=across, yerr=spreads, marker="o", capsize=3, label=str(label)
        )
        if has_words:
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


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
