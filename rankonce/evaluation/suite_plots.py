"""The suite's plots as SVG that stands inside a page: its text takes the page's fonts."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rankonce.evaluation.metrics import Estimate
from rankonce.evaluation.suite_metrics import mean_of
from rankonce.evaluation.suite_results import (
    BASE,
    CEILING,
    FLOOR,
    RANKER,
    TREES,
    SuiteReport,
    TaskReport,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#25303b", "#98a2ad", "#e3e7eb"
BLUE, GREEN, ORANGE, VIOLET = "#1f5fa8", "#2a9168", "#d2741a", "#7a4fb0"
_GROUP_COLOURS = {"T1": BLUE, "T2": VIOLET, "unknown": BLUE}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#c4cbd2",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def draw(label: str, size: tuple[float, float], paint: Callable[["Axes"], None]) -> str:
    """Paint a figure and return it as an SVG element.

    Args:
        label: says what it shows to who cannot see it.
        size: in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt keeps the identifiers of several drawings on a page apart, and the same in each run.
    settings: Any = {**_STYLE, "svg.hashsalt": label}
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    spoken = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{spoken}" ', 1)


def plot_overview(report: SuiteReport) -> str:
    """The main metric of every task between its floor and its ceiling."""
    tasks = order_tasks(report)

    def paint(axes: "Axes") -> None:
        places = np.arange(len(tasks))[::-1]
        for place, task in zip(places, tasks, strict=True):
            values = {name: _value(task, name) for name in (FLOOR, TREES, CEILING)}
            known = [v for v in (values[FLOOR], values[CEILING]) if not math.isnan(v)]
            if len(known) == 2:
                axes.plot(known, [place, place], color=GRID, linewidth=5, zorder=1)
            axes.plot(values[FLOOR], place, "|", color=FAINT, markersize=11, markeredgewidth=2)
            axes.plot(values[CEILING], place, "|", color=GREEN, markersize=11, markeredgewidth=2)
            axes.plot(values[TREES], place, "|", color=ORANGE, markersize=11, markeredgewidth=2)
            _point(axes, task.rankers[RANKER][task.main], place, _GROUP_COLOURS[task.group])
        _mark_chance(axes, vertical=True)
        axes.set_yticks(places, [f"{task.task}" for task in tasks])
        axes.set_ylim(-0.8, len(tasks) - 0.2)
        axes.set_xlabel("AUC (concordance for graded tasks), ± standard error")
        axes.grid(axis="x", color=GRID)
        handles = [
            axes.plot([], [], "|", color=FAINT, markersize=11, markeredgewidth=2)[0],
            axes.plot([], [], "|", color=ORANGE, markersize=11, markeredgewidth=2)[0],
            axes.plot([], [], "|", color=GREEN, markersize=11, markeredgewidth=2)[0],
        ]
        names = ["popularity (floor)", "trees", "truth (ceiling)"]
        for group in dict.fromkeys(task.group for task in tasks):
            handles.append(axes.plot([], [], "o", color=_GROUP_COLOURS[group], markersize=6)[0])
            names.append("ranker" if group == "unknown" else f"ranker, {group}")
        axes.legend(
            handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.3
        )

    return draw("Main metric of every task with floor and ceiling", (10.4, _height(tasks)), paint)


def plot_family(report: SuiteReport, family: str, title: str, label: str) -> str:
    """The main metric against the size of the arms: thin a task, thick their mean.

    Tasks count that have every size. Without examples, and with the history that a task's own
    policy picks, stands what the requests are by themselves.
    """
    arms = {a.name: a for t in report.tasks for a in t.arms if a.family == family}
    sizes = {name: float("inf") if arm.size is None else arm.size for name, arm in arms.items()}
    names = sorted(sizes, key=lambda name: sizes[name])
    numbers = [name.split()[0] for name in names]
    if family == "examples":
        steps, ticks = [BASE, *names], ["0", *numbers]
    else:
        steps, ticks = [*names, BASE], [*numbers, "the task's own"]
    complete = [task for task in order_tasks(report) if all(task.arm(step) for step in steps)]

    def paint(axes: "Axes") -> None:
        for task in complete:
            values = [_arm_value(task, step) for step in steps]
            axes.plot(ticks, values, color=_GROUP_COLOURS[task.group], alpha=0.22, linewidth=1)
        for group in dict.fromkeys(task.group for task in complete):
            members = [task for task in complete if task.group == group]
            means = [_mean_of(members, step) for step in steps]
            axes.errorbar(
                ticks,
                [one.value for one in means],
                yerr=[one.standard_error for one in means],
                color=_GROUP_COLOURS[group],
                linewidth=2.4,
                marker="o",
                markersize=6,
                capsize=3,
                label=f"mean of {len(members)} {'' if group == 'unknown' else group + ' '}"
                f"task{'s' if len(members) > 1 else ''}",
            )
        _mark_chance(axes)
        axes.set(title=title, xlabel=label, ylabel="AUC / concordance")
        axes.grid(axis="y", color=GRID)
        axes.margins(x=0.06)
        if complete:
            axes.legend(loc="best", fontsize=8.5)

    return draw(title, (5.1, 3.7), paint) if complete else ""


def plot_titles(report: SuiteReport) -> str:
    """Bars from chance: with the titles as they are, and shuffled."""
    tasks = [task for task in order_tasks(report) if task.arm("titles shuffled")]

    def paint(axes: "Axes") -> None:
        places = np.arange(len(tasks))[::-1].astype(float)
        for offset, arm, colour, name in (
            (0.19, BASE, BLUE, "titles as they are"),
            (-0.19, "titles shuffled", ORANGE, "titles shuffled"),
        ):
            heights = [_arm_value(task, arm) - 0.5 for task in tasks]
            axes.barh(places + offset, heights, 0.36, left=0.5, color=colour, label=name)
        _mark_chance(axes, vertical=True)
        axes.set_yticks(places, [task.task for task in tasks])
        axes.set_ylim(-0.8, len(tasks) - 0.2)
        axes.set_xlabel("AUC (concordance for graded tasks), from chance")
        axes.grid(axis="x", color=GRID)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)

    return draw("Titles shuffled and not", (10.4, _height(tasks)), paint) if tasks else ""


def plot_all_reliability(report: SuiteReport) -> str:
    """Every task's calibration in one drawing."""
    tasks = order_tasks(report)

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        for group in dict.fromkeys(task.group for task in tasks):
            members = [task for task in tasks if task.group == group]
            colour = _GROUP_COLOURS[group]
            for task in members:
                points = np.array(task.reliability)
                axes.plot(points[:, 0], points[:, 1], color=colour, alpha=0.22, linewidth=1)
            shares, came = _pool([one for task in members for one in task.reliability])
            name = "all tasks" if group == "unknown" else f"{group} together"
            axes.plot(shares, came, color=colour, linewidth=2.4, marker="o", label=name)
        axes.set(
            title="Reliability",
            xlabel="mean probability in a bin",
            ylabel="how often it came true",
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
        )
        axes.grid(color=GRID)
        axes.legend(loc="upper left", fontsize=8.5)

    return draw("Reliability of every task", (5.1, 3.7), paint) if tasks else ""


def plot_reliability(task: TaskReport) -> str:
    """One task's calibration; the bars are one standard error of the shares."""

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        shares, came, counts = zip(*task.reliability, strict=True)
        axes.plot(shares, came, color=BLUE, linewidth=1.4, marker="o", markersize=4.5)
        errors = [
            math.sqrt(max(share * (1 - share), 0.0) / count)
            for share, count in zip(came, counts, strict=True)
        ]
        axes.errorbar(shares, came, yerr=errors, color=BLUE, linewidth=0, elinewidth=1)
        axes.set(
            xlabel="mean probability",
            ylabel="came true",
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
            aspect="equal",
        )
        axes.grid(color=GRID)

    return draw(f"Reliability of {task.task}", (3.1, 2.9), paint)


def _point(axes: "Axes", one: Estimate, place: float, colour: str) -> None:
    error = 0.0 if math.isnan(one.standard_error) else one.standard_error
    axes.errorbar(one.value, place, xerr=error, fmt="o", color=colour, markersize=6, zorder=3)


def _mark_chance(axes: "Axes", *, vertical: bool = False) -> None:
    line = axes.axvline if vertical else axes.axhline
    line(0.5, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)


def _value(task: TaskReport, ranker: str) -> float:
    metrics = task.rankers.get(ranker)
    return math.nan if metrics is None else metrics[task.main].value


def _arm_value(task: TaskReport, name: str) -> float:
    arm = task.arm(name)
    return math.nan if arm is None else arm.metrics[task.main].value


def _pool(bins: Sequence[tuple[float, float, int]]) -> tuple[list[float], list[float]]:
    """Join the bins of several tasks to at most ten of about equally many rows."""
    ordered = np.array(sorted(bins))
    counts = ordered[:, 2]
    middles = (np.cumsum(counts) - counts / 2) / counts.sum()
    places = np.minimum((middles * 10).astype(int), 9)
    parts = [ordered[places == place] for place in np.unique(places)]
    means = [np.average(part[:, :2], axis=0, weights=part[:, 2]) for part in parts]
    return [float(one[0]) for one in means], [float(one[1]) for one in means]


def _mean_of(tasks: Sequence[TaskReport], step: str) -> Estimate:
    return mean_of([arm.metrics[task.main] for task in tasks if (arm := task.arm(step))])


def order_tasks(report: SuiteReport) -> list[TaskReport]:
    """Take the measured tasks, T1 first, those of one source together."""
    measured = [task for task in report.tasks if not task.failure]
    return sorted(measured, key=lambda task: (task.group, task.source, task.task))


def _height(tasks: Sequence[TaskReport]) -> float:
    return 1.1 + 0.29 * len(tasks)
