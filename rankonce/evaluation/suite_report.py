"""A suite's numbers as JSON, as a long table in Parquet, as a table for people and as a page."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from rankonce.environment import describe_environment
from rankonce.evaluation.metrics import Estimate
from rankonce.evaluation.suite_html import render_page
from rankonce.evaluation.suite_results import (
    BASE,
    CEILING,
    FLOOR,
    RANKER,
    TREES,
    ArmReport,
    SuiteReport,
    TaskReport,
)

_COLUMNS: dict[str, Any] = {
    "task": pl.String,
    "group": pl.String,
    "source": pl.String,
    "arm": pl.String,
    "bucket_kind": pl.String,
    "bucket": pl.String,
    "ranker": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "standard_error": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "num_rows": pl.Int64,
}


def write_suite(out: Path, report: SuiteReport) -> None:
    """Write ``suite.json``, ``suite.parquet`` and ``report.html`` into a folder."""
    environment = describe_environment()
    out.mkdir(parents=True, exist_ok=True)
    record = {**_plain(asdict(report)), "environment": environment}
    (out / "suite.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    known = {name: record[name] for name in ("model", "trained_on", "config", "environment")}
    long_table(report).write_parquet(
        out / "suite.parquet", metadata={"suite": json.dumps(known, allow_nan=False)}
    )
    (out / "report.html").write_text(render_page(report, environment), encoding="utf-8")


def long_table(report: SuiteReport) -> pl.DataFrame:
    """Put every number on a row of its own: task, arm, bucket, ranker, metric, value."""
    rows = [row for task in report.tasks for row in _long_rows(task)]
    return pl.DataFrame(rows, schema=_COLUMNS, orient="row")


def _long_rows(task: TaskReport) -> Iterator[list[Any]]:
    def row(
        arm: str, kind: str, bucket: str, ranker: str, metric: str, one: Estimate, num_rows: int
    ) -> list[Any]:
        numbers = (one.value, one.standard_error, one.low, one.high)
        known = [None if math.isnan(number) else number for number in numbers]
        place = [task.task, task.group, task.source, arm, kind, bucket, ranker, metric]
        return [*place, *known, num_rows]

    for ranker, metrics in task.rankers.items():
        for metric, one in metrics.items():
            yield row(BASE, "all", "all", ranker, metric, one, task.num_rows)
    for arm in task.arms:
        if arm.name != BASE:
            for metric, one in arm.metrics.items():
                yield row(arm.name, "all", "all", RANKER, metric, one, task.num_rows)
    for bucket in task.buckets:
        for ranker, one in bucket.estimates.items():
            yield row(BASE, bucket.kind, bucket.name, ranker, task.main, one, bucket.num_rows)


def render_suite(report: SuiteReport) -> Table:
    """Draw one line a task: the main metric between floor and ceiling, and what the arms change."""
    arms = _arm_names(report.tasks)
    table = Table("task", "set", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "AUC / conc.",
        FLOOR,
        TREES,
        CEILING,
        "NDCG@10",
        "NE",
        "ECE",
        *(f"Δ {n}" for n in arms),
    ):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for task in report.tasks:
        if task.failure:
            table.add_row(task.task, task.group, Text("failed", style="red"))
            continue
        metrics = task.rankers[RANKER]
        table.add_row(
            task.task,
            task.group,
            _with_error(metrics[task.main]),
            *(
                _short(task.rankers.get(name, {}).get(task.main))
                for name in (FLOOR, TREES, CEILING)
            ),
            *(_short(metrics[n]) for n in ("ndcg@10", "normalised_entropy", "calibration_error")),
            *(_difference(task.arm(name)) for name in arms),
        )
    return table


def _arm_names(tasks: Sequence[TaskReport]) -> list[str]:
    """Arms that have numbers in any task, in the order of the run."""
    measured = {arm.name for task in tasks for arm in task.arms if arm.difference is not None}
    every = dict.fromkeys(arm.name for task in tasks for arm in task.arms)
    return [name for name in every if name in measured]


def _short(one: Estimate | None) -> str:
    return "–" if one is None or math.isnan(one.value) else f"{one.value:.3f}"


def _with_error(one: Estimate) -> str:
    return _short(one) + ("" if math.isnan(one.standard_error) else f" ± {one.standard_error:.3f}")


def _difference(arm: ArmReport | None) -> str:
    one = None if arm is None else arm.difference
    return "–" if one is None or math.isnan(one.value) else f"{one.value:+.3f}"


def _plain(value: Any) -> Any:
    """Bring numbers that are not defined into a form that JSON has."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
