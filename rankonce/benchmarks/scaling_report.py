"""The record of a scaling study as tables and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankonce.benchmarks.scaling_law import ScalingLaw
from rankonce.errors import MissingDependencyError


def describe_scaling(record: Mapping[str, Any]) -> str:
    """Write a finished record as tables in Markdown: points, law, trials; and its warnings."""
    prediction, law = record["prediction"], ScalingLaw(**record["prediction"]["law"])
    lines = [
        "| size | weights, no embedding | learning rate | requests | log-loss | by the law | AUC |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for runs in (*group_runs(record["runs"]), *group_runs(record["held_out"])):
        first = runs[0]
        said = law.loss(first["weights"], first["requests"])
        is_held_out = first in record["held_out"]
        cells = [
            first["size"],
            f"{first['weights']:,}",
            f"{first['learning_rate']:g}",
            f"{first['requests']:,}",
            _mean_and_error([run["expected_log_loss"] for run in runs]),
            f"{said:.4f}{' (predicted)' if is_held_out else ''}",
            f"{statistics.mean(run['auc'] for run in runs):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    measured = statistics.mean(run["expected_log_loss"] for run in record["held_out"])
    inside = prediction["low"] <= measured <= prediction["high"]
    truth, noise = record["truth"], prediction["seed_noise"]
    rows = {
        "E of the law": f"{law.floor:.4f}",
        "E of the simulator": f"{truth['floor']:.4f}",
        "a constant": f"{truth['constant']:.4f}",
        "N0, a": f"{law.size_scale:.4g}, {law.size_power:.3f}",
        "D0, b": f"{law.data_scale:.4g}, {law.data_power:.3f}",
        "deviation of log L around the law": f"{prediction['residual']:.4f}",
        "deviation of log L between seeds": "one seed" if noise is None else f"{noise:.4f}",
        "predicted": f"{prediction['loss']:.4f}",
        f"{prediction['confidence']:.0%} interval": (
            f"{prediction['low']:.4f} to {prediction['high']:.4f}"
        ),
        "measured": f"{measured:.4f}, {'inside' if inside else 'outside'}",
        "prediction written": prediction["written"],
        "first run of that point": min(run["started"] for run in record["held_out"]),
    }
    lines += ["", "| law | |", "| --- | ---: |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    trials = group_runs(record["trials"])
    tried = [f"{run['learning_rate']:g}" for run in trials[0]]
    requests = f"{trials[0][0]['requests']:,}"
    lines += ["", f"| trial, {requests} requests, learning rate | {' | '.join(tried)} |"]
    lines.append(f"| --- | {' | '.join('---:' for _ in tried)} |")
    for runs in trials:
        losses = [f"{run['expected_log_loss']:.4f}" for run in runs]
        lines.append(f"| {runs[0]['size']} | {' | '.join(losses)} |")
    if record["warnings"]:
        lines += ["", *(f"- **Warning:** {warning}." for warning in record["warnings"])]
    return "\n".join(lines)


def group_runs(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Put the seeds of a point together."""
    points: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        points.setdefault((run["size"], run["requests"]), []).append(run)
    return list(points.values())


def check_picture() -> None:
    """Make sure that a picture can be drawn, before anything long is computed for it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="bench") from error


def plot_scaling(path: Path, record: Mapping[str, Any]) -> None:
    """Draw log-loss against data: the runs and the law of each size, and the predicted point.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_picture()
    from matplotlib.figure import Figure

    prediction, law = record["prediction"], ScalingLaw(**record["prediction"]["law"])
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    every = [*record["runs"], *record["held_out"]]
    amounts = [run["requests"] for run in every]
    data = np.geomspace(min(amounts), max(amounts) * 1.1, 100)
    weights = {run["size"]: run["weights"] for run in every}
    for colour, (size, count) in enumerate(weights.items()):
        runs = [run for run in record["runs"] if run["size"] == size]
        axes.plot(data, [law.loss(count, one) for one in data], color=f"C{colour}", linewidth=1)
        axes.plot(
            [run["requests"] for run in runs],
            [run["expected_log_loss"] for run in runs],
            "o",
            color=f"C{colour}",
            label=f"{size}: {count:,} weights",
        )
    axes.errorbar(
        prediction["requests"],
        prediction["loss"],
        yerr=[
            [prediction["loss"] - prediction["low"]],
            [prediction["high"] - prediction["loss"]],
        ],
        color="0.2",
        capsize=4,
        label=f"{prediction['size']}, predicted, {prediction['confidence']:.0%} interval",
    )
    axes.plot(
        [run["requests"] for run in record["held_out"]],
        [run["expected_log_loss"] for run in record["held_out"]],
        "*",
        color="C3",
        markersize=12,
        label=f"{prediction['size']}, run afterwards",
    )
    axes.axhline(record["truth"]["constant"], color="0.7", linestyle=":", label="a constant")
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(amounts)), [f"{amount:,}" for amount in sorted(set(amounts))])
    axes.minorticks_off()
    floor = record["truth"]["floor"]
    axes.set(
        xlabel="train requests",
        ylabel="log-loss, nats",
        title=f"{record['study']['task']} (the simulator's own loss is {floor:.3f})",
    )
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _mean_and_error(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"
