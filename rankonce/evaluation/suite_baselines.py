"""What the suite puts beside a ranker: popularity, and boosted trees over the prompt's own fields.

Both learn from the earlier requests of the task alone and guess P(label) of the later ones' rows.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from rankonce.datasets.boosted_trees import fit_trees
from rankonce.evaluation.suite_data import SuiteRequest
from rankonce.prompts.features import Floats
from rankonce.prompts.tasks import Task
from rankonce.records import ScoreRequest, Value

# A share counts as if this many labels of the average had come before.
_STRENGTH = 4.0
_EARLY_SHARE = 0.8
# Fewer rows than this make no tree worth its name, rarer words of a list no column.
_LEAST_ROWS, _LEAST_OF_WORD = 200, 20
# P(label) of every candidate, request by request.
Guesses = list[list[dict[str, float]]]


def popularity(
    task: Task, earlier: Sequence[SuiteRequest], later: Sequence[SuiteRequest]
) -> Guesses:
    """Guess how often a candidate got each label before, drawn towards the labels' shares.

    A candidate without an id, or one not seen earlier, has the shares themselves.
    """
    names = task.label_names
    counts: dict[str, Floats] = {}
    total = np.zeros(len(names))
    for number, place, label in _labelled(task, earlier):
        item = earlier[number].example.request.candidates[place]
        total[label] += 1
        if item.id is not None:
            counts.setdefault(item.id, np.zeros(len(names)))[label] += 1
    shares = (total + 1) / (total.sum() + len(names))
    nothing = np.zeros(len(names))

    def guess(item_id: str | None) -> dict[str, float]:
        seen = counts.get(item_id, nothing) if item_id is not None else nothing
        guessed = (seen + _STRENGTH * shares) / (seen.sum() + _STRENGTH)
        return dict(zip(names, guessed.tolist(), strict=True))

    return [[guess(item.id) for item in one.example.request.candidates] for one in later]


def trees(
    task: Task, earlier: Sequence[SuiteRequest], later: Sequence[SuiteRequest]
) -> Guesses | None:
    """Guess by boosted trees (LightGBM: Ke et al., 2017) what a table of the same fields says.

    Columns: every number and category of the candidate and of the profile, the texts of their
    lists, the number of events and of candidates, and which share of the candidate's words the
    profile and the history have. The number of trees is chosen on the newest fifth of the earlier
    requests.

    Returns:
        ``None`` where fewer than 200 earlier rows, or one label alone, are known.

    Raises:
        MissingDependencyError: LightGBM is not installed.
    """
    rows = list(_labelled(task, earlier))
    labels = np.array([label for _, _, label in rows], dtype=np.int64)
    cut = int(_EARLY_SHARE * len(earlier))
    early = np.array([number < cut for number, _, _ in rows], dtype=np.bool_)
    parts = (labels[early], labels[~early]) if len(rows) >= _LEAST_ROWS else (labels[:0],)
    if any(len(np.unique(part)) < 2 for part in parts):
        return None
    facts = [list(_facts(one.example.request)) for one in earlier]
    known = [facts[number][place] for number, place, _ in rows]
    table = _Table(known)
    predict = fit_trees(
        table.columns(known),
        labels,
        early_R=early,
        num_labels=len(task.label_names),
        categories=table.categories,
    )
    asked = [list(_facts(one.example.request)) for one in later]
    shares = predict(table.columns([one for request in asked for one in request])).tolist()
    guesses = iter([dict(zip(task.label_names, row, strict=True)) for row in shares])
    return [[next(guesses) for _ in request] for request in asked]


def _labelled(task: Task, requests: Sequence[SuiteRequest]) -> Iterator[tuple[int, int, int]]:
    """Give the request's number, the candidate's place and the label's where it is known."""
    for number, one in enumerate(requests):
        for place, label in enumerate(one.example.labels):
            if isinstance(label, str) and label in task.label_names:
                yield number, place, task.label_names.index(label)


def _facts(request: ScoreRequest) -> Iterator[dict[str, Value]]:
    """Say of every candidate what a table can hold of the request."""
    profile = {f"profile {name}": value for name, value in request.profile.items()}
    member_words = _words(request.profile.values())
    history_words = _words(
        value for event in request.history for value in event.item.fields.values()
    )
    sizes = {"events": len(request.history), "candidates": len(request.candidates)}
    for item in request.candidates:
        words = _words(item.fields.values())
        shared = {
            f"words of the {name}": len(words & others) / max(1, len(words))
            for name, others in (("profile", member_words), ("history", history_words))
        }
        yield {**profile, **item.fields, **sizes, **shared}


def _words(values: Iterable[Value]) -> set[str]:
    texts = [
        text
        for value in values
        for text in (
            [value] if isinstance(value, str) else value if isinstance(value, list) else ()
        )
    ]
    return set(re.findall(r"\w+", " ".join(texts).lower()))


class _Table:
    """Columns of numbers for facts, as they were first seen; nan for what is new or missing."""

    def __init__(self, facts: Sequence[Mapping[str, Value]]) -> None:
        self._codes: dict[str, dict[str, int]] = {}
        words: Counter[tuple[str, str]] = Counter()
        names: dict[str, None] = {}
        for fact in facts:
            for name, value in fact.items():
                if isinstance(value, str):
                    codes = self._codes.setdefault(name, {})
                    codes.setdefault(value, len(codes))
                elif isinstance(value, list):
                    words.update((name, word) for word in value)
                elif value is not None:
                    names[name] = None
        self._numbers = [name for name in names if name not in self._codes]
        self._words = [word for word, count in words.items() if count >= _LEAST_OF_WORD]

    @property
    def categories(self) -> list[int]:
        """The places of the columns whose numbers are codes."""
        return list(range(len(self._codes)))

    def columns(self, facts: Sequence[Mapping[str, Value]]) -> Floats:
        """Give the columns, (facts, columns): categories, numbers, words of lists."""
        return np.array([self._row(fact) for fact in facts], dtype=np.float64)

    def _row(self, fact: Mapping[str, Value]) -> list[float]:
        codes = [
            codes.get(value, np.nan) if isinstance(value := fact.get(name), str) else np.nan
            for name, codes in self._codes.items()
        ]
        numbers = [
            float(value) if isinstance(value := fact.get(name), int | float) else np.nan
            for name in self._numbers
        ]
        words = [
            float(word in value) if isinstance(value := fact.get(name), list) else np.nan
            for name, word in self._words
        ]
        return [*codes, *numbers, *words]
