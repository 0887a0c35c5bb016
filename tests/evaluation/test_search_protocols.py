"""Cross-validation over queries on a collection with planted relevance."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankonce.datasets.search_index import Floats, SearchIndex
from rankonce.datasets.search_sets import SearchFold, split_queries
from rankonce.errors import DataError
from rankonce.evaluation.search_baselines import SEARCH_BASELINES, choose_bm25, score_by_bm25
from rankonce.evaluation.search_protocols import (
    CrossValidation,
    FoldConfig,
    RankedList,
    compare_rankers,
    crossvalidate,
    measure_rankers,
)
from tests.search_collection import planted_set

CONFIG = FoldConfig(num_folds=3, num_candidates=30)


def test_folds_share_no_query_and_hold_every_query_once() -> None:
    queries = [f"q{number}" for number in range(23)]
    folds = split_queries(queries, num_folds=5, seed=7)
    assert sorted(map(len, folds)) == [4, 4, 5, 5, 5]
    assert sorted(query for fold in folds for query in fold) == sorted(queries)
    assert folds == split_queries(queries, num_folds=5, seed=7)
    assert folds != split_queries(queries, num_folds=5, seed=8)
    for wrong in (1, 24):
        with pytest.raises(DataError, match="num_folds: should be from 2 to the number"):
            split_queries(queries, num_folds=wrong, seed=0)


def test_models_on_the_evidence_find_what_bm25_does_not(tmp_path: Path) -> None:
    search_set = planted_set()
    validation = crossvalidate(search_set, SEARCH_BASELINES, tmp_path, config=CONFIG)
    rows = {row.name: row for row in measure_rankers(validation, search_set, num_resamples=50)}
    assert rows["BM25"].metrics["ndcg@10"] < 0.8
    assert rows["logistic regression on the evidence"].metrics["ndcg@10"] > 0.9
    (difference, _) = compare_rankers(validation, search_set, num_resamples=50)
    assert difference.name == "logistic regression on the evidence against BM25"
    assert difference.metrics["low"] > 0.05
    assert difference.metrics["queries won"] > difference.metrics["queries lost"]
    ranked = [one.query for one in validation.lists["BM25"]]
    assert sorted(ranked) == sorted(search_set.queries)


def test_a_ranker_sees_no_grade_of_the_queries_that_it_ranks(tmp_path: Path) -> None:
    search_set = planted_set()
    seen: list[tuple[set[str | None], set[str | None]]] = []

    def spy(fold: SearchFold) -> list[Floats]:
        train = {one.request.id for one in fold.train}
        test = {request.id for request in fold.test}
        seen.append((train, test))
        return score_by_bm25(fold)

    crossvalidate(search_set, {"BM25": spy}, tmp_path, config=CONFIG)
    assert len(seen) == 3
    for train, test in seen:
        assert not train & test
        assert train | test == set(search_set.queries)


def test_bm25_is_chosen_on_the_train_queries_alone() -> None:
    search_set = planted_set()
    index = SearchIndex(search_set.documents)
    train = [f"q{number}" for number in range(18)]
    chosen = choose_bm25(index, search_set, train)
    # Whatever the others are judged to be, the choice stays.
    turned = {
        query: judged if query in train else {item: 4 - grade for item, grade in judged.items()}
        for query, judged in search_set.grades.items()
    }
    assert choose_bm25(index, replace(search_set, grades=turned), train) == chosen


def test_finished_folds_are_kept(tmp_path: Path) -> None:
    search_set = planted_set()
    calls: list[int] = []

    def broken(fold: SearchFold) -> list[Floats]:
        calls.append(fold.number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_by_bm25(fold)

    with pytest.raises(KeyboardInterrupt):
        crossvalidate(search_set, {"BM25": broken}, tmp_path, config=CONFIG)
    again = crossvalidate(search_set, {"BM25": broken}, tmp_path, config=CONFIG)
    assert calls == [0, 1, 1, 2]
    whole = crossvalidate(search_set, {"BM25": score_by_bm25}, tmp_path / "other", config=CONFIG)
    assert again.lists == whole.lists


def test_a_folder_of_other_folds_is_refused(tmp_path: Path) -> None:
    search_set = planted_set()
    rankers = {"BM25": score_by_bm25}
    crossvalidate(search_set, rankers, tmp_path, config=CONFIG)
    with pytest.raises(DataError, match="another seed"):
        crossvalidate(search_set, rankers, tmp_path, config=replace(CONFIG, seed=1))
    with pytest.raises(DataError, match="another sha256"):
        crossvalidate(planted_set(seed=1), rankers, tmp_path, config=CONFIG)
    with pytest.raises(DataError, match="another learning"):
        crossvalidate(search_set, rankers, tmp_path, config=CONFIG, learning={"size": "3m"})
    assert json.loads((tmp_path / "crossvalidation.json").read_text())["seed"] == 0


def test_a_ranker_that_forgets_a_candidate_is_named(tmp_path: Path) -> None:
    def short(fold: SearchFold) -> list[Floats]:
        return [scores[1:] for scores in score_by_bm25(fold)]

    with pytest.raises(DataError, match="short: should give one score for every candidate"):
        crossvalidate(planted_set(), {"short": short}, tmp_path, config=CONFIG)
    with pytest.raises(DataError, match="num_candidates: should be at least 10, is 9"):
        crossvalidate(planted_set(), {}, tmp_path, config=FoldConfig(num_candidates=9))


def test_the_ideal_order_has_judged_documents_that_were_not_found() -> None:
    search_set = planted_set()
    query = "q0"
    found = tuple(name for name in search_set.documents if name not in ("d0", "d24"))[:12]
    grades = [search_set.grades[query].get(name, 0) for name in found]
    one = RankedList(
        query=query, documents=found, scores=tuple(-float(n) for n in range(len(found)))
    )
    validation = CrossValidation(bm25=(), lists={"BM25": (one,)}, seconds={})
    (row,) = measure_rankers(validation, search_set, num_resamples=2)

    discounts = 1 / np.log2(np.arange(10) + 2)

    def dcg(values: list[int], *, linear: bool = False) -> float:
        gains = np.array(values[:10], dtype=float) if linear else 2.0 ** np.array(values[:10]) - 1
        return float(gains @ discounts[: len(gains)])

    everything = sorted(search_set.grades[query].values(), reverse=True)
    assert sum(grades) < sum(everything)
    expected = dcg(grades) / dcg(everything)
    assert row.metrics["ndcg@10"] == pytest.approx(expected)
    assert row.metrics["ndcg@10 of the candidates"] == pytest.approx(
        dcg(grades) / dcg(sorted(grades, reverse=True)) if any(grades) else np.nan, nan_ok=True
    )
    assert row.metrics["ndcg@10, linear gains"] == pytest.approx(
        dcg(grades, linear=True) / dcg(everything, linear=True)
    )
    assert row.metrics["distinct_score_ratio"] == 1.0
