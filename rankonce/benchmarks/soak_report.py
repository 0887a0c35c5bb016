"""The record of a soak in words."""

from collections.abc import Mapping
from typing import Any


def describe_soak(record: Mapping[str, Any]) -> str:
    """Write the record as Markdown."""
    settings, memory = record["settings"], record["memory"]
    shape = settings["workload"]
    lines = [
        f"{settings['minutes']:g} minutes at {record['rate']:.3g} requests/s"
        + (
            f", {100 * settings['load']:.0f} % of a capacity of "
            f"{record['capacity_requests_per_s']:.3g}"
            if "capacity_requests_per_s" in record
            else ""
        )
        + f": prefix of {shape['prefix_tokens']} tokens, {shape['num_candidates']} candidates of "
        f"{shape['candidate_tokens']}, {settings['members']} members, checkpoint "
        f"{settings['model']}; {record['environment']['processor']}, "
        f"{record['environment']['usable_cores']} cores, commit {record['environment']['commit']}.",
        "",
        "| questions | number |",
        "|---|---|",
        *(f"| {outcome} | {count} |" for outcome, count in record["outcomes"].items()),
        "",
        f"- wrong scores: {record['num_wrong']}; the greatest difference of a log-probability from "
        f"the offline score is {record['worst_difference']:.1g}",
        f"- latency of right answers: p50 {_ms(record['p50_ms'])}, p99 {_ms(record['p99_ms'])}, "
        "those around an outage included",
        f"- killed {record['kills']} times, down for {record['outage_seconds']} s; ended by itself "
        f"{record['deaths']} times",
        f"- memory: {_describe_memory(memory)}",
        f"- batches: {_describe_batches(record['batches'])}",
        f"- what must not happen: {record['num_faults'] or 'nothing did'}",
        *(f"  - {fault}" for fault in record["faults"]),
    ]
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} ms"


def _describe_memory(memory: Mapping[str, Any]) -> str:
    if memory["growth_mb"] is None:
        return "too few samples to tell"
    return (
        f"{memory['first_mb']:.0f} MB in the first and {memory['last_mb']:.0f} MB in the last "
        f"quarter of {memory['settled_minutes']:.1f} minutes after the warm-up of the longest life "
        f"({memory['growth_mb']:+.1f} MB, {memory['mb_per_hour']:+.1f} MB an hour); "
        f"{memory['max_mb']:.0f} MB at most"
    )


def _describe_batches(batches: Mapping[str, Any] | None) -> str:
    if batches is None:
        return "none were sent"
    return (
        f"{batches['num_lines']} lines in {batches['num_batches']} batches, {batches['num_lost']} "
        f"lost, {batches['num_twice']} twice, {batches['num_wrong']} wrong, "
        f"{batches['unfinished']} batches unfinished"
    )
