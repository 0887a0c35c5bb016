"""The record of a load benchmark as tables, bars and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankonce.errors import MissingDependencyError

# By how much the best of our forms should surpass each server on the workloads of members.
BARS = {"vllm": 3.0, "transformers": 10.0}


def describe_serving(record: Mapping[str, Any]) -> str:
    """Write the record as Markdown: capacities, bars, and latency by rate."""
    settings, machine = record["settings"], record["environment"]
    bound = f"p99 ≤ {settings['bound_ms']:g} ms"
    lines = [
        f"{machine['processor']}, {machine['usable_cores']} cores shared by server and client, "
        f"{settings['threads']} threads a server, checkpoint {settings['model']}, fp32, commit "
        f"{machine['commit']}. "
        + ", ".join(server["version"] for server in settings["servers"].values())
        + "."
    ]
    for name, shape in record["workloads"].items():
        arms = [arm for arm in record["arms"] if arm["workload"] == name]
        lines += [
            "",
            f"**{name}**: prefix of {shape['prefix_tokens']} tokens, {shape['num_candidates']} "
            f"candidates of {shape['candidate_tokens']}.",
            "",
            f"| server | alone, ms | alone, candidates/s | {bound}, candidates/s | p50, p90, p99 "
            "there, ms | memory, MB | Δ log-prob |",
            "|---|---|---|---|---|---|---|",
            *(_row(arm) for arm in arms),
        ]
    lines += ["", *_describe_bars(record)]
    lines += ["", "| server | workload | requests/s | answered | p50, ms | p90, ms | p99, ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    for arm in record["arms"]:
        for step in sorted(arm.get("steps", ()), key=lambda step: step["rate"]):
            lines.append(
                f"| {arm['arm']} | {arm['workload']} | {step['rate']:.3g} | "
                f"{step['num_answered']} of {step['num_requests']} | {_latencies(step, ' | ')} |"
            )
    return "\n".join(lines)


def plot_serving(path: Path, record: Mapping[str, Any]) -> None:
    """Draw p99 by candidates a second, a panel for each workload.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="bench") from error
    workloads = record["workloads"]
    figure = Figure(figsize=(5.5 * len(workloads), 4.2), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    names = list(dict.fromkeys(arm["arm"] for arm in record["arms"]))
    for axes, (name, shape) in zip(panels, workloads.items(), strict=True):
        for arm in (a for a in record["arms"] if a["workload"] == name):
            known = sorted(
                (step["rate"] * shape["num_candidates"], step["p99_ms"])
                for step in arm.get("steps", ())
                if step["p99_ms"] is not None
            )
            color = f"C{names.index(arm['arm'])}"
            if known:
                axes.plot(*zip(*known, strict=True), "o-", color=color, label=arm["arm"])
            elif "alone_candidates_per_s" in arm:
                axes.plot(
                    arm["alone_candidates_per_s"],
                    arm["alone_ms"],
                    "x",
                    color=color,
                    label=f"{arm['arm']}, one request at a time",
                )
        bound_ms = record["settings"]["bound_ms"]
        axes.axhline(bound_ms, color="0.5", linewidth=1, label=f"bound, {bound_ms:g} ms")
        axes.set(xscale="log", yscale="log", title=name)
        axes.set(xlabel="candidates a second", ylabel="p99, ms")
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _row(arm: Mapping[str, Any]) -> str:
    capacity = arm.get("capacity_candidates_per_s")
    best = _step_at_capacity(arm)
    cells = [
        arm["arm"],
        f"{arm['alone_ms']:.0f}",
        f"{arm['alone_candidates_per_s']:.0f}",
        "broken off" if capacity is None else f"{capacity:.0f}" if capacity else "at no rate",
        "" if best is None else _latencies(best, ", "),
        "" if arm["memory_mb"] is None else f"{arm['memory_mb']:.0f}",
        f"{arm['greatest_difference']:.1g}",
    ]
    return f"| {' | '.join(cells)} |"


def _step_at_capacity(arm: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rate = arm.get("capacity_requests_per_s")
    found = [step for step in arm.get("steps", ()) if step["rate"] == rate]
    return found[-1] if found else None


def _latencies(step: Mapping[str, Any], between: str) -> str:
    values = (step["p50_ms"], step["p90_ms"], step["p99_ms"])
    return between.join("–" if value is None else f"{value:.0f}" for value in values)


def _describe_bars(record: Mapping[str, Any]) -> list[str]:
    return [
        f"- {name}, {server}: {_describe_bar(record, name, server, bar)}"
        for name, shape in record["workloads"].items()
        if shape["has_task"]
        for server, bar in BARS.items()
    ]


def _describe_bar(record: Mapping[str, Any], workload: str, server: str, bar: float) -> str:
    """Compare capacities; a server that meets the bound nowhere, by what it does alone."""
    done = [arm for arm in record["arms"] if arm["workload"] == workload and _is_done(arm)]
    ours = max((_capacity(arm) for arm in done if arm["server"] == "rankonce"), default=0.0)
    others = [arm for arm in done if arm["server"] == server]
    if not others or not ours:
        return "not measured"
    theirs = max(map(_capacity, others))
    how = "at equal p99"
    if not theirs:
        theirs = max(arm["alone_candidates_per_s"] for arm in others)
        how = (
            "of what it does one request at a time, since it meets the bound at no rate, "
            f"{others[0]['alone_ms']:.0f} ms each"
        )
    ratio = ours / theirs
    return f"{ratio:.2f}× {how}; the bar of {bar:g}× is {'met' if ratio >= bar else 'missed'}"


def _is_done(arm: Mapping[str, Any]) -> bool:
    return "capacity_candidates_per_s" in arm


def _capacity(arm: Mapping[str, Any]) -> float:
    capacity: float = arm["capacity_candidates_per_s"]
    return capacity
