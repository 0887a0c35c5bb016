"""A ranker's first numbers on labelled requests, task by task, as between the stages of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rankonce.errors import DataError
from rankonce.evaluation.metrics import auc, ndcg_at_k
from rankonce.evaluation.weighted_metrics import exponential_gains
from rankonce.prompts.tasks import Task
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import ScoreResult, TrainingExample


def measure_held_out(
    model: Path, examples: Sequence[TrainingExample], *, tasks: Sequence[Task] = ()
) -> dict[str, dict[str, float]]:
    """Score labelled requests with a model's folder.

    Args:
        examples: with labels; candidates without one are left out.
        tasks: beside those of the library.

    Returns:
        By task: ``labels``, ``log_loss`` over these, soft ones by their shares,
        ``distinct_score_ratio``; over the hard labels ``auc`` where the task ranks by one label,
        ``ndcg@10`` where it ranks by grades.

    Raises:
        DataError: no candidate has a label.
    """
    # The weights' own scores: a calibration in the folder is of weights before these.
    config = RankerConfig(calibrate=False)
    return measure_ranker(Ranker.from_pretrained(model, tasks=tasks, config=config), examples)


def measure_ranker(
    ranker: Ranker, examples: Sequence[TrainingExample]
) -> dict[str, dict[str, float]]:
    """Do the same with a ranker that is loaded."""
    results = ranker.score_many([example.request for example in examples])
    by_task: dict[str, list[tuple[TrainingExample, ScoreResult]]] = {}
    for example, result in zip(examples, results, strict=True):
        by_task.setdefault(example.request.task, []).append((example, result))
    measured = {name: _measure(ranker.tasks[name], pairs) for name, pairs in by_task.items()}
    if not any(numbers["labels"] for numbers in measured.values()):
        raise DataError("labels: should be known of one candidate at least")
    return measured


def _measure(task: Task, pairs: Sequence[tuple[TrainingExample, ScoreResult]]) -> dict[str, float]:
    grade_of = dict(zip(task.label_names, task.grades, strict=True))
    grades, values, losses, requests = [], [], [], []
    for number, (example, result) in enumerate(pairs):
        for label, candidate in zip(example.labels, result.candidates, strict=True):
            if isinstance(label, Mapping):
                losses.append(
                    -sum(share * candidate.log_probs[name] for name, share in label.items())
                )
            elif isinstance(label, str):
                grades.append(grade_of[label])
                values.append(candidate.value)
                losses.append(-candidate.log_probs[label])
                requests.append(number)
    numbers = {"labels": float(len(losses))}
    if losses:
        numbers["log_loss"] = float(np.mean(losses))
        numbers["distinct_score_ratio"] = float(
            np.mean([result.distinct_score_ratio for _, result in pairs])
        )
        if grades and task.ranking.kind == "expected_grade":
            numbers["ndcg@10"] = ndcg_at_k(exponential_gains(grades), values, requests, k=10)
        elif len(set(grades)) == 2:
            numbers["auc"] = auc(grades, values)
    return numbers
