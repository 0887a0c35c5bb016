"""Cross-validation over queries: each is ranked once, by what learned from the others.

The candidates of a query are BM25's best, with k1 and b chosen on the fold's train queries. NDCG@10
has exponential gains, 2^grade - 1, because a reader wants complete answers first; its ideal order
is that of all judged documents, found or not, so that a ranker pays for what BM25 did not find.
Beside it stand NDCG@10 against the best order of the candidates themselves, and with linear gains.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rankonce.datasets.search_index import Floats, SearchIndex
from rankonce.datasets.search_sets import (
    SearchFold,
    SearchSet,
    make_fold,
    split_queries,
)
from rankonce.errors import DataError
from rankonce.evaluation.metrics import (
    bootstrap_over_members,
    distinct_score_ratio,
    ndcg_at_k,
    paired_bootstrap_over_members,
)
from rankonce.evaluation.report import EvaluationRow
from rankonce.evaluation.search_baselines import FoldRanker, choose_bm25
from rankonce.evaluation.weighted_metrics import exponential_gains

NDCG = "ndcg@10"
FIRST_STAGE = "BM25"
_RECORD = "crossvalidation.json"


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """How queries are cut and searched.

    Attributes:
        num_folds: parts of the queries; each is ranked by what learned from the others.
        num_candidates: of a list, at least 10.
        seed: of the cut.
    """

    num_folds: int = 5
    num_candidates: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RankedList:
    """The scores of one query's candidates, in the request's order."""

    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """What every ranker made of every query.

    Attributes:
        bm25: k1 and b of each fold.
        lists: by ranker, one a query.
        seconds: by ranker, of each fold, for learning and scoring.
    """

    bm25: tuple[tuple[float, float], ...]
    lists: Mapping[str, tuple[RankedList, ...]]
    seconds: Mapping[str, tuple[float, ...]]


def crossvalidate(
    search_set: SearchSet,
    rankers: Mapping[str, FoldRanker],
    out: Path,
    *,
    config: FoldConfig | None = None,
    index: SearchIndex | None = None,
    learning: Mapping[str, object] | None = None,
) -> CrossValidation:
    """Let every ranker learn from each fold's train queries and score its test queries.

    Finished folds are kept in ``out`` and are not computed again.

    Args:
        rankers: by name; each takes a fold and gives a score for every candidate of every test
            list.
        index: of the search set's documents, where it is there already.
        learning: settings of the rankers, as JSON; finished folds are of the same ones.

    Raises:
        DataError: ``out`` belongs to other data or another cut, or a ranker gives another number
            of scores.
    """
    from rich.console import Console
    from rich.progress import Progress

    config = config or FoldConfig()
    if config.num_candidates < 10:
        raise DataError(f"num_candidates: should be at least 10, is {config.num_candidates}")
    _claim(out, search_set, config, learning or {})
    whole = index or SearchIndex(search_set.documents)
    parts = split_queries(list(search_set.queries), num_folds=config.num_folds, seed=config.seed)
    settings: list[tuple[float, float]] = []
    lists: dict[str, list[RankedList]] = {name: [] for name in rankers}
    seconds: dict[str, list[float]] = {name: [] for name in rankers}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("folds", total=len(parts) * len(rankers))
        for number, test in enumerate(parts):
            train = [query for query in search_set.queries if query not in set(test)]
            settings.append(choose_bm25(whole, search_set, train))
            k1, b = settings[-1]
            fold: SearchFold | None = None
            for name, ranker in rankers.items():
                progress.update(bar, description=f"fold {number + 1}/{len(parts)}, {name}")
                path = out / f"fold-{number}" / f"{_file_name(name)}.json"
                if not path.exists():
                    fold = fold or make_fold(
                        search_set,
                        whole.with_bm25(k1=k1, b=b),
                        test,
                        number=number,
                        num_candidates=config.num_candidates,
                    )
                    _write(path, name, fold, ranker)
                done = json.loads(path.read_text(encoding="utf-8"))
                lists[name] += [
                    RankedList(
                        query=one["query"],
                        documents=tuple(one["documents"]),
                        scores=tuple(one["scores"]),
                    )
                    for one in done["lists"]
                ]
                seconds[name].append(done["seconds"])
                progress.advance(bar)
    return CrossValidation(
        bm25=tuple(settings),
        lists={name: tuple(found) for name, found in lists.items()},
        seconds={name: tuple(times) for name, times in seconds.items()},
    )


def measure_rankers(
    validation: CrossValidation, search_set: SearchSet, *, num_resamples: int = 1000
) -> list[EvaluationRow]:
    """Measure every ranker over all queries, with standard errors over drawn queries."""
    rows = []
    for name, lists in validation.lists.items():
        grades, scores, members = _rows(lists, search_set, whole=True)
        estimate = bootstrap_over_members(
            NDCG, grades, scores, members, num_resamples=num_resamples
        )
        found, found_scores, found_members = _rows(lists, search_set, whole=False)
        rows.append(
            EvaluationRow(
                name=name,
                metrics={
                    NDCG: estimate.value,
                    f"{NDCG} of the candidates": ndcg_at_k(
                        exponential_gains(found), found_scores, found_members, k=10
                    ),
                    f"{NDCG}, linear gains": ndcg_at_k(grades, scores, members, k=10),
                    "distinct_score_ratio": float(
                        np.mean([distinct_score_ratio(one.scores) for one in lists])
                    ),
                },
                standard_errors={NDCG: estimate.standard_error},
            )
        )
    return rows


def compare_rankers(
    validation: CrossValidation,
    search_set: SearchSet,
    *,
    other: str = FIRST_STAGE,
    num_resamples: int = 1000,
) -> list[EvaluationRow]:
    """Give each ranker's NDCG@10 minus another's on the same drawn queries, 95 % of them.

    A query counts as won where its own NDCG@10 is higher.
    """
    grades, others, members = _rows(validation.lists[other], search_set, whole=True)
    gains = exponential_gains(grades)
    rows = []
    for name, lists in validation.lists.items():
        if name == other:
            continue
        again, scores, _ = _rows(lists, search_set, whole=True)
        if not np.array_equal(grades, again):
            raise DataError(f"{name}: should have ranked the candidates of {other}")
        estimate = paired_bootstrap_over_members(
            NDCG, gains, scores, others, members, num_resamples=num_resamples
        )
        each = [
            ndcg_at_k(
                gains[members == query],
                scores[members == query],
                np.zeros(sum(members == query)),
                k=10,
            )
            - ndcg_at_k(
                gains[members == query],
                others[members == query],
                np.zeros(sum(members == query)),
                k=10,
            )
            for query in np.unique(members)
        ]
        rows.append(
            EvaluationRow(
                name=f"{name} against {other}",
                metrics={
                    "difference": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "queries won": sum(gain > 1e-9 for gain in each),
                    "queries lost": sum(gain < -1e-9 for gain in each),
                },
                standard_errors={"difference": estimate.standard_error},
            )
        )
    return rows


def _rows(
    lists: Sequence[RankedList], search_set: SearchSet, *, whole: bool
) -> tuple[Floats, Floats, np.ndarray]:
    """Give grade, score and query of every candidate.

    Args:
        whole: judged documents that are no candidates stand at the end of their list, so that the
            ideal order has them. A list of all documents, or of ten and more, has none of them in
            its first ten.
    """
    grades: list[int] = []
    scores: list[float] = []
    members: list[int] = []
    for number, one in enumerate(lists):
        judged = search_set.grades[one.query]
        missing = [name for name in judged if name not in set(one.documents)] if whole else []
        grades += [judged.get(name, 0) for name in (*one.documents, *missing)]
        scores += [*one.scores, *[min(one.scores) - 1.0] * len(missing)]
        members += [number] * (len(one.documents) + len(missing))
    return np.array(grades, dtype=np.float64), np.array(scores), np.array(members)


def _write(path: Path, name: str, fold: SearchFold, ranker: FoldRanker) -> None:
    started = time.perf_counter()
    scores = ranker(fold)
    taken = time.perf_counter() - started
    expected = [len(request.candidates) for request in fold.test]
    if [len(one) for one in scores] != expected:
        raise DataError(f"{name}: should give one score for every candidate of every test list")
    lists = [
        {
            "query": request.id,
            "documents": [candidate.id for candidate in request.candidates],
            "scores": np.asarray(one, dtype=np.float64).tolist(),
        }
        for request, one in zip(fold.test, scores, strict=True)
    ]
    _replace(path, {"ranker": name, "seconds": taken, "lists": lists})


def _claim(
    out: Path, search_set: SearchSet, config: FoldConfig, learning: Mapping[str, object]
) -> None:
    """Say whose folds these are, or check that they are the same as before."""
    record = {
        "dataset": search_set.name,
        "sha256": search_set.fingerprint,
        **asdict(config),
        "learning": json.loads(json.dumps(learning)),
    }
    path = out / _RECORD
    if not path.exists():
        _replace(path, record)
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != record:
        changed = ", ".join(sorted(name for name in record if before.get(name) != record[name]))
        raise DataError(f"out: {out} holds folds with another {changed}; choose a new folder")


def _replace(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _file_name(name: str) -> str:
    return name.lower().replace(" ", "-").replace(",", "")
