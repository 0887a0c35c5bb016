"""Judged queries over a collection, and the folds of a cross-validation over queries."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rankonce.datasets.candidate_lists import CandidateList
from rankonce.datasets.common_form import Dataset
from rankonce.datasets.search_evidence import EvidenceWriter
from rankonce.datasets.search_index import SearchIndex
from rankonce.errors import DataError
from rankonce.records import ScoreRequest, Value


@dataclass(frozen=True, kw_only=True)
class SearchSet:
    """A collection and queries with judgements.

    Attributes:
        queries: text by id, those that have a judgement.
        documents: title and text by id; one that is empty is left out.
        grades: by query and document, 0 where a document was judged irrelevant. What was not
            judged is taken as 0.
    """

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, Mapping[str, Value]]
    grades: Mapping[str, Mapping[str, int]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything in it."""
        content = json.dumps([self.queries, self.documents, self.grades], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SearchFold:
    """One part of the queries to be ranked, and the others to learn from.

    Attributes:
        number: from 0.
        index: with the BM25 that suits the train queries best.
        train: lists of all other queries, with grades.
        test: lists to be scored, without any grade.
    """

    number: int
    index: SearchIndex
    train: tuple[CandidateList, ...]
    test: tuple[ScoreRequest, ...]


def read_search_set(dataset: Dataset) -> SearchSet:
    """Read a prepared dataset whose queries were judged (Cranfield, WANDS, ESCI).

    Raises:
        DataError: the dataset has no queries.
    """
    judged = dataset.read("judgements").select("query", "item", "grade").collect()
    texts = dataset.read("queries").select("query", "text").collect()
    items = dataset.read("items").select("item", "title", "text").collect()
    documents: dict[str, dict[str, Value]] = {}
    for item, title, text in items.iter_rows():
        if title is not None or text is not None:
            fields: dict[str, Value] = {"title": title, "text": text}
            documents[item] = {name: value for name, value in fields.items() if value is not None}
    known = judged.filter(pl.col("item").is_in(list(documents)))
    grades: dict[str, dict[str, int]] = {}
    for query, item, grade in known.iter_rows():
        grades.setdefault(query, {})[item] = grade
    queries = {query: text for query, text in texts.iter_rows() if query in grades}
    return SearchSet(name=dataset.name, queries=queries, documents=documents, grades=grades)


def split_queries(queries: Sequence[str], *, num_folds: int, seed: int) -> list[tuple[str, ...]]:
    """Cut queries into folds of nearly equal size by a draw; each query is in one fold.

    Raises:
        DataError: there are fewer than two folds, or fewer queries than folds.
    """
    if not 2 <= num_folds <= len(queries):
        raise DataError(
            f"num_folds: should be from 2 to the number of queries, {len(queries)}, is {num_folds}"
        )
    order = np.random.default_rng(seed).permutation(len(queries))
    return [
        tuple(queries[place] for place in part.tolist())
        for part in np.array_split(order, num_folds)
    ]


def make_fold(
    search_set: SearchSet,
    index: SearchIndex,
    test: Sequence[str],
    *,
    number: int,
    num_candidates: int,
) -> SearchFold:
    """Search with every query and write what was found; grades go to the train lists alone."""
    writer = EvidenceWriter(index, num_candidates=num_candidates)
    requests = {
        query: writer.write_request(text, id=query) for query, text in search_set.queries.items()
    }
    held_out = set(test)
    return SearchFold(
        number=number,
        index=index,
        train=tuple(
            CandidateList(request=request, grades=grades_of(search_set, request))
            for query, request in requests.items()
            if query not in held_out
        ),
        test=tuple(requests[query] for query in test),
    )


def grades_of(search_set: SearchSet, request: ScoreRequest) -> tuple[int, ...]:
    """Return the grades of a request's candidates; 0 for what was not judged."""
    judged = search_set.grades[str(request.id)]
    return tuple(judged.get(str(candidate.id), 0) for candidate in request.candidates)
