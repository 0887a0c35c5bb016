"""Rankers of a search fold without a language model.

Each takes a fold and gives one score a candidate of every test list. BM25 orders the lists as they
were found; the other two read the same evidence as the language model, as numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np

from rankonce.datasets.search_index import Floats, SearchIndex, tokenize_texts
from rankonce.datasets.search_sets import SearchFold, SearchSet
from rankonce.errors import MissingDependencyError
from rankonce.evaluation.metrics import ndcg_at_k
from rankonce.evaluation.weighted_metrics import exponential_gains
from rankonce.records import ScoreRequest

FoldRanker = Callable[[SearchFold], list[Floats]]

_K1 = (0.9, 1.2, 1.5, 2.0, 2.5, 3.0)
_B = (0.3, 0.5, 0.75, 0.9)
# Not evidence: words, and what BM25 already is.
_NOT_NUMBERS = ("title", "text")
# Few trees of few leaves: 120 queries have some 600 relevant candidates.
_NUM_TREES = 150
_LIGHTGBM = {
    "objective": "lambdarank",
    "label_gain": [0, 1, 3, 7, 15],
    "learning_rate": 0.03,
    "num_leaves": 7,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "seed": 1,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}
_REGRESSION_STRENGTH = 0.01


def choose_bm25(
    index: SearchIndex, search_set: SearchSet, queries: Sequence[str]
) -> tuple[float, float]:
    """Choose k1 and b by NDCG@10 (exponential gains) of these queries over the whole collection.

    Returns:
        k1 and b; the first of those that are equally good.
    """
    words = tokenize_texts([search_set.queries[query] for query in queries])
    grades = np.array(
        [[search_set.grades[query].get(name, 0) for name in index.ids] for query in queries]
    )
    members = np.repeat(np.arange(len(queries)), len(index.ids))
    gains = exponential_gains(grades.ravel())

    def measure(settings: tuple[float, float]) -> float:
        keywords = index.with_bm25(k1=settings[0], b=settings[1]).keywords
        scores = np.concatenate([keywords.score(query) for query in words])
        return ndcg_at_k(gains, scores, members, k=10)

    return max(product(_K1, _B), key=measure)


def score_by_bm25(fold: SearchFold) -> list[Floats]:
    """Give the scores that the lists were found by."""
    places = {name: place for place, name in enumerate(fold.index.ids)}
    words = tokenize_texts([str(request.profile["query"]) for request in fold.test])
    return [
        fold.index.keywords.score(query)[[places[str(item.id)] for item in request.candidates]]
        for query, request in zip(words, fold.test, strict=True)
    ]


def score_by_logistic_regression(fold: SearchFold) -> list[Floats]:
    """Fit log-odds of a grade above 0, linear in the standardised evidence (L2-regularised).

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn", extra="eval") from error

    features = np.concatenate([evidence_matrix(one.request) for one in fold.train])
    relevant = [grade is not None and grade > 0 for one in fold.train for grade in one.grades]
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=_REGRESSION_STRENGTH, max_iter=1000)
    ).fit(features, relevant)
    return [model.decision_function(evidence_matrix(request)) for request in fold.test]


def score_by_lambdamart(fold: SearchFold) -> list[Floats]:
    """Fit boosted trees to the order of the train lists (LambdaMART; LightGBM: Ke et al., 2017).

    Raises:
        MissingDependencyError: LightGBM is not installed.
    """
    try:
        import lightgbm
    except ModuleNotFoundError as error:
        raise MissingDependencyError("lightgbm", extra="eval") from error

    rows = lightgbm.Dataset(
        np.concatenate([evidence_matrix(one.request) for one in fold.train]),
        [grade or 0 for one in fold.train for grade in one.grades],
        group=[len(one.grades) for one in fold.train],
    )
    model = lightgbm.train(_LIGHTGBM, rows, num_boost_round=_NUM_TREES)
    return [
        np.asarray(model.predict(evidence_matrix(request), num_threads=1)) for request in fold.test
    ]


def evidence_matrix(request: ScoreRequest) -> Floats:
    """Return the evidence of a request's candidates as numbers, columns in the names' order."""
    names = sorted(set(request.candidates[0].fields) - set(_NOT_NUMBERS))
    return np.array(
        [[candidate.fields[name] for name in names] for candidate in request.candidates],
        dtype=np.float64,
    )


SEARCH_BASELINES: Mapping[str, FoldRanker] = {
    "BM25": score_by_bm25,
    "logistic regression on the evidence": score_by_logistic_regression,
    "LambdaMART on the evidence": score_by_lambdamart,
}
