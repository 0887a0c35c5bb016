"""Metrics of rankers side by side on labelled requests of any task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rankonce.errors import DataError, RankOnceError, TaskError
from rankonce.evaluation.metrics import (
    bootstrap_over_members,
    distinct_score_ratio,
    paired_bootstrap_over_members,
)
from rankonce.evaluation.report import EvaluationRow
from rankonce.prompts.tasks import Task, find_task
from rankonce.ranker import Ranker
from rankonce.records import ScoreRequest, ScoreResult, TrainingExample

# Of tasks that rank by one label, and of those that rank by grades.
_BY_LABEL = (
    "auc",
    "uauc",
    "ndcg@10",
    "log_loss",
    "normalised_entropy",
    "expected_calibration_error",
)
_BY_GRADE = ("ndcg@10",)


@dataclass(frozen=True, kw_only=True)
class LabelledEvaluation:
    """Rankers side by side on the same candidates.

    Attributes:
        rows: one for every ranker and task; standard errors over requests.
        differences: for every task the first ranker's AUC (NDCG@10 where grades rank) minus that
            of each other one, paired.
        tokens: what the first ranker read, and what one prompt per candidate would have cost.
        left_out: candidates without a label or with a soft one.
        scores: task, user_id (the request's number), label and score of the first ranker: what
            ranks, 0 or 1 and P(label), or the grade and the expected one.
    """

    rows: Sequence[EvaluationRow]
    differences: Sequence[EvaluationRow]
    tokens: Mapping[str, int]
    scores: pl.DataFrame
    left_out: int = 0


def evaluate_examples(
    rankers: Mapping[str, Ranker],
    examples: Sequence[TrainingExample],
    *,
    num_resamples: int = 200,
) -> LabelledEvaluation:
    """Score labelled requests with one ranker or several.

    Args:
        rankers: by name, one at least.
        examples: with hard labels; candidates without a label or with a soft one are left out.

    Raises:
        DataError: a request cannot be scored, no candidate has a hard label, or a label is none of
            its task.
    """
    known = next(iter(rankers.values())).tasks
    left_out = sum(_count_left_out(one, known, n) for n, one in enumerate(examples, start=1))
    requests = [example.request for example in examples]
    tables: dict[str, pl.DataFrame] = {}
    tokens = {"computed_tokens": 0, "separate_tokens": 0}
    for name, ranker in rankers.items():
        values: list[dict[str, object]] = []
        for number, (example, result) in enumerate(
            zip(examples, _score(ranker, requests), strict=True)
        ):
            if not tables:
                tokens["computed_tokens"] += result.usage.computed_tokens
                tokens["separate_tokens"] += result.usage.separate_tokens
            task = ranker.tasks[example.request.task]
            grade_of = dict(zip(task.label_names, task.grades, strict=True))
            for label, candidate in zip(example.labels, result.candidates, strict=True):
                if not isinstance(label, str):
                    continue
                shares = np.exp([candidate.log_probs[one] for one in grade_of])
                values.append(
                    {
                        "task": example.request.task,
                        "user_id": number,
                        "label": grade_of[label],
                        "score": float(shares @ task.grades),
                    }
                )
        tables[name] = pl.DataFrame(values)
    first = next(iter(tables.values()))
    if not first.height:
        raise DataError("labels: should be hard for one candidate at least")
    rows, differences = [], []
    for task in first["task"].unique(maintain_order=True):
        parts = {
            name: table.filter(pl.col("task") == task).drop("task")
            for name, table in tables.items()
        }
        metrics = _metrics_of(next(iter(rankers.values())).tasks[task])
        for name, part in parts.items():
            rows.append(_measure(f"{name}, {task}", part, metrics, num_resamples))
        (name, part), *others = parts.items()
        for other, table in others:
            estimate = paired_bootstrap_over_members(
                metrics[0],
                part["label"],
                part["score"],
                table["score"],
                part["user_id"],
                num_resamples=num_resamples,
            )
            differences.append(
                EvaluationRow(
                    name=f"{task}: {metrics[0]} of {name} against {other}",
                    metrics={
                        "difference": estimate.value, "low": estimate.low, "high": estimate.high,
                    },
                    standard_errors={"difference": estimate.standard_error},
                )
            )  # fmt: skip
    return LabelledEvaluation(
        rows=rows, differences=differences, tokens=tokens, scores=first, left_out=left_out
    )


def _count_left_out(example: TrainingExample, tasks: Mapping[str, Task], number: int) -> int:
    """Check the labels of a request, and count its candidates that cannot be measured."""
    try:
        names = find_task(example.request.task, tasks).label_names
    except TaskError as error:
        raise DataError(f"{example.place(number)}: {error}") from error
    for label in example.labels:
        if isinstance(label, str) and label not in names:
            raise DataError(
                f"{example.place(number)}: labels: should be of {', '.join(names)} or null, has "
                f"{label!r}"
            )
    return sum(not isinstance(label, str) for label in example.labels)


def _score(ranker: Ranker, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
    try:
        return list(ranker.score_many(requests))
    except RankOnceError:
        for number, request in enumerate(requests, start=1):
            try:
                ranker.prepare(request)
            except RankOnceError as error:
                raise DataError(f"request {number}: {error}") from error
        raise


def _metrics_of(task: Task) -> tuple[str, ...]:
    return _BY_GRADE if task.ranking.kind == "expected_grade" else _BY_LABEL


def _measure(
    name: str, part: pl.DataFrame, metrics: Sequence[str], num_resamples: int
) -> EvaluationRow:
    estimates = {
        metric: bootstrap_over_members(
            metric, part["label"], part["score"], part["user_id"], num_resamples=num_resamples
        )
        for metric in metrics
    }
    return EvaluationRow(
        name=name,
        metrics={
            **{metric: estimate.value for metric, estimate in estimates.items()},
            "distinct_score_ratio": distinct_score_ratio(part["score"]),
            "candidates": float(part.height),
        },
        standard_errors={m: estimate.standard_error for m, estimate in estimates.items()},
    )
