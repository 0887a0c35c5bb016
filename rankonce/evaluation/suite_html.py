"""The suite's report: one page that needs nothing beside itself."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from rankonce.errors import MissingDependencyError
from rankonce.evaluation import suite_plots as plots
from rankonce.evaluation.metrics import Estimate
from rankonce.evaluation.suite_metrics import BUCKET_KINDS, mean_of
from rankonce.evaluation.suite_results import (
    BASE,
    CEILING,
    FLOOR,
    RANKER,
    TREES,
    SuiteReport,
    TaskReport,
)

# Column of the main table, and the metric; each metric fits some tasks.
_METRICS = {
    "UAUC": "uauc",
    "NDCG@10": "ndcg@10",
    "log-loss": "log_loss",
    "NE": "normalised_entropy",
    "ECE": "calibration_error",
}
_GROUPS = {
    "T1": "T1 · trained on, asked later",
    "T2": "T2 · never trained on",
    "unknown": "not recorded what the model was trained on",
}


def check_report() -> None:
    """Make sure that a page can be made, before anything long is computed for it.

    Raises:
        MissingDependencyError: jinja2, matplotlib or LightGBM is not installed.
    """
    for library, extra in (("jinja2", "bench"), ("matplotlib", "bench"), ("lightgbm", "eval")):
        try:
            __import__(library)
        except ImportError as error:
            raise MissingDependencyError(library, extra=extra) from error


def render_page(report: SuiteReport, environment: Mapping[str, Any]) -> str:
    """Write the page.

    Raises:
        MissingDependencyError: as ``check_report``.
    """
    check_report()
    from jinja2 import Environment, StrictUndefined

    measured = plots.order_tasks(report)
    groups = {
        group: [task for task in measured if task.group == group]
        for group in _GROUPS
        if any(task.group == group for task in measured)
    }
    arms = _changed_arms(measured)
    template = (
        resources.files("rankonce.evaluation").joinpath("suite.html.jinja").read_text("utf-8")
    )
    engine = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters.update(
        number=_number, error=_error, signed=_signed, verdict=_verdict, day=_day, percent=_percent
    )
    return engine.from_string(template).render(
        report=report,
        environment=environment,
        measured=measured,
        groups=groups,
        group_names=_GROUPS,
        columns=[c for c in _METRICS if any(_METRICS[c] in t.rankers[RANKER] for t in measured)],
        metrics=_METRICS,
        means={group: _means(tasks) for group, tasks in groups.items()},
        arms=arms,
        arm_means={
            group: {arm: mean_of(_differences(tasks, arm)) for arm in arms}
            for group, tasks in groups.items()
        },
        bucket_tables=_bucket_tables(measured),
        ranker=RANKER,
        floor=FLOOR,
        trees=TREES,
        ceiling=CEILING,
        base=BASE,
        plots=_plots(report) if measured else {},
        task_plots={task.task: plots.plot_reliability(task) for task in measured},
        made=datetime.now(UTC),
    )


def _plots(report: SuiteReport) -> dict[str, str]:
    return {
        "overview": plots.plot_overview(report),
        "examples": plots.plot_family(
            report, "examples", "In-context examples", "solved candidates in the prompt"
        ),
        "history": plots.plot_family(
            report, "history", "Length of the history", "newest events that stay"
        ),
        "titles": plots.plot_titles(report),
        "reliability": plots.plot_all_reliability(report),
    }


def _means(tasks: Sequence[TaskReport]) -> dict[str, Any]:
    """Average the tasks of a group; trees and ceiling over those that have them."""
    reached = [task.reach for task in tasks if task.reach is not None]
    return {
        "main": {
            name: mean_of([t.rankers[name][t.main] for t in tasks if name in t.rankers])
            for name in (RANKER, FLOOR, TREES, CEILING)
        },
        "metrics": {
            metric: mean_of(
                [t.rankers[RANKER][metric] for t in tasks if metric in t.rankers[RANKER]]
            )
            for metric in _METRICS.values()
        },
        "reach": sum(reached) / len(reached) if reached else None,
        "distinct": sum(t.distinct_score_ratio or 0.0 for t in tasks) / len(tasks),
        "rows": sum(t.num_rows for t in tasks),
    }


def _changed_arms(tasks: Sequence[TaskReport]) -> list[str]:
    """Arms that have numbers in any task, in the order of the run."""
    measured = {arm.name for task in tasks for arm in task.arms if arm.difference is not None}
    return [arm.name for arm in tasks[0].arms if arm.name in measured] if tasks else []


def _differences(tasks: Sequence[TaskReport], name: str) -> list[Estimate]:
    arms = (task.arm(name) for task in tasks)
    return [arm.difference for arm in arms if arm is not None and arm.difference is not None]


def _bucket_tables(tasks: Sequence[TaskReport]) -> dict[str, dict[str, Any]]:
    """Give each kind's buckets in order, and each task's reports by the bucket."""
    kinds = {bucket.kind for task in tasks for bucket in task.buckets}
    tables: dict[str, dict[str, Any]] = {
        kind: {"names": [], "tasks": {}} for kind in BUCKET_KINDS if kind in kinds
    }
    for task in tasks:
        for bucket in task.buckets:
            table = tables[bucket.kind]
            if bucket.name not in table["names"]:
                table["names"].append(bucket.name)
            table["tasks"].setdefault(task.task, {})[bucket.name] = bucket
    for table in tables.values():
        table["names"].sort(key=_bucket_order)
        found = {
            name: [t[name] for t in table["tasks"].values() if name in t] for name in table["names"]
        }
        table["rows"] = {name: sum(b.num_rows for b in buckets) for name, buckets in found.items()}
        table["means"] = {
            name: {
                ranker: mean_of([b.estimates[ranker] for b in buckets if ranker in b.estimates])
                for ranker in (RANKER, FLOOR, TREES, CEILING)
                if any(ranker in b.estimates for b in buckets)
            }
            for name, buckets in found.items()
        }
    return tables


def _bucket_order(name: str) -> tuple[float, str]:
    digits = name.lstrip(">").partition("–")[0]
    return (
        (float(digits) + (0.5 if name.startswith(">") else 0.0), "")
        if digits.isdigit()
        else (
            math.inf,
            name,
        )
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _error(one: Estimate | None) -> str:
    unknown = one is None or math.isnan(one.value) or math.isnan(one.standard_error)
    return "" if one is None or unknown else f"±{one.standard_error:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _verdict(one: Estimate | None) -> str:
    """Say of a difference whether 95 % of its resamples lie on one side of nothing."""
    if one is None or math.isnan(one.low) or math.isnan(one.high) or one.low <= 0 <= one.high:
        return "even"
    return "better" if one.low > 0 else "worse"


def _day(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %".replace("-", "−")
