"""What a search engine knows of query and document, as fields of the task ``search-relevance``.

Every value comes from the query, the documents and counts over the collection; none from a
judgement. Most are relative to the list of candidates ("85 % of the best score"), as only
their order inside it matters.

    keyword_rank, keyword_score       BM25 over title and text
    title_score, phrase_score         BM25 over titles; over pairs of neighbouring words
    expanded_score                    TF-IDF after the query took up words of the first results
                                      (Rocchio, 1971, with results instead of judgements)
    topic_rank, topic_score           latent topics of query and document
    coverage, title_coverage,         part of the query's words that are found, each as much as it
    passage_coverage                  is rare: anywhere, in the title, in the best passage
    rare_found                        how many of the query's three rarest words are found
    like_first, like_three, like_ten  likeness (TF-IDF) to the first results
    topic_like_three, like_all        likeness by topics: to the first by topic, to all candidates
    num_words                         length without stop words
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

import numpy as np

from rankonce.datasets.search_index import (
    Floats,
    Ints,
    KeywordIndex,
    SearchIndex,
    phrases_of,
    tokenize_texts,
)
from rankonce.records import Item, ScoreRequest, Value

TASK = "search-relevance"
PASSAGE_WORDS = 24
_PASSAGE_STEP = 8
_NUM_RARE = 3
# Expansion: results that give words, how many words, and their part of the new query.
_NUM_FEEDBACK, _NUM_NEW_WORDS, _NEW_SHARE = 10, 50, 0.7


class View(StrEnum):
    """What a candidate says of itself.

    A document without a title is named by its passage.
    """

    EVIDENCE = "evidence"  # title and evidence
    PASSAGE = "passage"  # title, the passage that covers most of the query, evidence
    TEXT = "text"  # title and passage, no evidence


class EvidenceWriter:
    """Writes requests for queries over one collection.

    Args:
        index: the collection; its BM25 finds the candidates.
        num_candidates: of a request, the best by BM25.
    """

    def __init__(self, index: SearchIndex, *, num_candidates: int = 100) -> None:
        self.index = index
        self.num_candidates = num_candidates
        self._passages: dict[int, tuple[list[str], list[set[str]]]] = {}

    def write_request(
        self, query: str, *, id: str | None = None, without: int | None = None
    ) -> ScoreRequest:
        """Search and describe what was found, best first by BM25.

        Args:
            without: the place of a document that is left out of the results.
        """
        (words,) = tokenize_texts([query])
        places = self.index.search(words, self.num_candidates, without=without)
        # In the query's order: a sum in the order of a set would differ from run to run.
        rarities = {word: self.index.rarity(word) for word in dict.fromkeys(words)}
        passages = [self._best_passage(rarities, place) for place in places.tolist()]
        columns = self._evidence(words, rarities, places)
        columns["passage_coverage"] = [covered for covered, _ in passages]
        candidates = []
        for row, place in enumerate(places.tolist()):
            fields: dict[str, Value] = {"text": passages[row][1]}
            if self.index.titles[place]:
                fields["title"] = self.index.titles[place]
            fields |= {name: column[row] for name, column in columns.items()}
            candidates.append(Item(id=self.index.ids[place], fields=fields))
        return ScoreRequest(
            task=TASK, id=id, profile={"query": query}, candidates=tuple(candidates)
        )

    def _evidence(
        self, words: list[str], rarities: Mapping[str, float], places: Ints
    ) -> dict[str, Sequence[Value]]:
        index = self.index
        keyword = index.keywords.score(words)[places]
        topic = (index.topic_weights[places] @ index.weigh_topics(words)).clip(0.0)
        by_topic = np.argsort(-topic, kind="stable")
        weights = index.word_weights[places]
        likeness = np.asarray((weights @ weights.T).todense())
        topics = index.topic_weights[places]
        topic_likeness = (topics @ topics.T).clip(0.0, 1.0)
        found = [set(index.tokens[place]) for place in places.tolist()]
        titled = [set(index.title_tokens[place]) for place in places.tolist()]
        rarest = sorted(rarities, key=lambda word: (-rarities[word], word))[:_NUM_RARE]
        columns: dict[str, Floats] = {
            "keyword_score": _of_best(keyword),
            "title_score": _of_best(_score(index.title_keywords, words, places)),
            "phrase_score": _of_best(_score(index.phrase_keywords, phrases_of(words), places)),
            "expanded_score": _of_best(self._expand(words, places, keyword)),
            "topic_score": _of_best(topic),
            "coverage": np.array([_covered(some, rarities) for some in found]),
            "title_coverage": np.array([_covered(some, rarities) for some in titled]),
            "like_first": likeness[:, :1].mean(axis=1).clip(0.0, 1.0),
            "like_three": likeness[:, :3].mean(axis=1).clip(0.0, 1.0),
            "like_ten": likeness[:, :10].mean(axis=1).clip(0.0, 1.0),
            "topic_like_three": topic_likeness[:, by_topic[:3]].mean(axis=1),
            "like_all": topic_likeness.mean(axis=1),
        }
        whole: dict[str, Sequence[Value]] = {
            "keyword_rank": list(range(1, len(places) + 1)),
            "topic_rank": (np.argsort(by_topic) + 1).tolist(),
            "rare_found": [sum(word in some for word in rarest) for some in found],
            "num_words": [len(index.tokens[place]) for place in places.tolist()],
        }
        return whole | {name: column.tolist() for name, column in columns.items()}

    def _expand(self, words: list[str], places: Ints, keyword: Floats) -> Floats:
        """Score the candidates for the query and the weightiest words of its first results."""
        index = self.index
        first = places[:_NUM_FEEDBACK]
        trust = keyword[:_NUM_FEEDBACK] / max(keyword[:_NUM_FEEDBACK].sum(), 1e-9)
        taken = np.asarray(index.word_weights[first].T @ trust).ravel()
        kept = np.argsort(-taken, kind="stable")[:_NUM_NEW_WORDS]
        new = np.zeros_like(taken)
        new[kept] = taken[kept]
        new /= max(float(np.linalg.norm(new)), 1e-9)
        asked = np.asarray(index.weigh_words(words).todense()).ravel()
        query = (1 - _NEW_SHARE) * asked + _NEW_SHARE * new
        return np.asarray(index.word_weights[places] @ query).ravel()

    def _best_passage(self, rarities: Mapping[str, float], place: int) -> tuple[float, str]:
        """Find the first passage of a text that covers most of the query: share and words."""
        passages, sets = self._passages_of(place)
        covered = [_covered(some, rarities) for some in sets]
        best = int(np.argmax(covered))
        return covered[best], passages[best]

    def _passages_of(self, place: int) -> tuple[list[str], list[set[str]]]:
        if place not in self._passages:
            words = (self.index.texts[place] or self.index.titles[place]).split()
            starts = range(0, max(1, len(words) - PASSAGE_WORDS + _PASSAGE_STEP), _PASSAGE_STEP)
            passages = [" ".join(words[start : start + PASSAGE_WORDS]) for start in starts]
            sets = [set(tokens) for tokens in tokenize_texts(passages)]
            self._passages[place] = passages, sets
        return self._passages[place]


def view_request(request: ScoreRequest, view: View) -> ScoreRequest:
    """Leave out what a view does not show."""
    shown = []
    for candidate in request.candidates:
        fields = dict(candidate.fields)
        if view is View.TEXT:
            fields = {name: fields[name] for name in ("title", "text") if name in fields}
        elif view is View.EVIDENCE:
            # The task requires a text: the title stands for it.
            fields["text"] = fields.pop("title", fields["text"])
        shown.append(replace(candidate, fields=fields))
    return replace(request, candidates=tuple(shown))


def _covered(found: set[str], rarities: Mapping[str, float]) -> float:
    """Part of the query's words that are found, each as much as it is rare."""
    whole = sum(rarities.values())
    part = sum(rarity for word, rarity in rarities.items() if word in found)
    return min(1.0, part / whole) if whole else 0.0


def _score(index: KeywordIndex | None, words: list[str], places: Ints) -> Floats:
    return index.score(words)[places] if index is not None else np.zeros(len(places))


def _of_best(scores: Floats) -> Floats:
    best = max(float(scores.max(initial=0.0)), 1e-9)
    return (scores / best).clip(0.0, 1.0)
