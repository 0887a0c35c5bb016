"""Pictures of the results: attention's rate by arm, and the time of passes beside their limit."""

from collections.abc import Sequence
from pathlib import Path

from rankonce.benchmarks.attention import OPERATION
from rankonce.benchmarks.results import MEASURED, Results, Row
from rankonce.benchmarks.workloads import MAIN_SHAPE
from rankonce.errors import MissingDependencyError


def plot_results(folder: Path, results: Results) -> list[Path]:
    """Draw what the results hold, as PNG.

    Returns:
        The pictures.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="bench") from error
    measured = [row for row in results.rows if row.status == MEASURED]
    attention = [row for row in measured if row.operation == OPERATION]
    passes = [row for row in measured if row.suite == "pass"]
    main = [row for row in passes if row.shape == MAIN_SHAPE.name] or passes
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for direction in ("forward", "backward"):
        rows = [row for row in attention if row.direction == direction]
        if rows:
            path = folder / f"attention-{direction}-{results.chip}.png"
            _plot_attention(path, rows, results)
            pictures.append(path)
    if main:
        path = folder / f"passes-{results.chip}.png"
        _plot_passes(path, main)
        pictures.append(path)
    return pictures


def _plot_attention(path: Path, rows: Sequence[Row], results: Results) -> None:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.shape, row.subject) for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    figure = Figure(figsize=(max(7.0, 1.3 * len(cases)), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        found = {(row.shape, row.subject): row.tflops or 0.0 for row in rows if row.arm == arm}
        places = [place for place, case in enumerate(cases) if case in found]
        axes.bar(
            [place + width * (number - (len(arms) - 1) / 2) for place in places],
            [found[cases[place]] for place in places],
            width,
            label=arm,
        )
    if results.ceilings is not None:
        ceiling = results.ceilings.matmul_tflops
        axes.axhline(ceiling, color="0.5", linewidth=1, label="ceiling of dense products")
    names = [f"{shape}\n{subject}" for shape, subject in cases]
    axes.set_xticks(range(len(cases)), names, fontsize=7, rotation=30, ha="right")
    axes.set(ylabel="TFLOP/s of useful work", title=f"Segment attention, {rows[0].direction}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _plot_passes(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    limits = [row.details["limit_ms"] for row in rows]
    axes.barh(places, [row.median_ms or 0.0 for row in rows], color="C0", label="measured")
    axes.plot(limits, places, "|", color="C3", markersize=12, label="limit in dense products")
    axes.set_yticks(places, [f"{row.subject}: {row.arm}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set(xlabel="ms a pass", title=rows[0].shape)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
