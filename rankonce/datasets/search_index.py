"""A searchable collection: keywords (BM25), TF-IDF and latent topics, of its documents alone.

No query and no judgement goes into an index, so that one may serve every fold of a validation.
BM25 is that of bm25s (Lù, 2024), with its stop words and the Snowball stemmer; latent topics are
those of Deerwester et al., "Indexing by Latent Semantic Analysis", 1990.
"""

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankonce.errors import DataError, MissingDependencyError
from rankonce.records import Value

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_TOPICS = 200
_STOP_WORDS = "english_plus"
# Of BM25 over titles and phrases; that of whole documents is the caller's to choose.
_SHORT_K1, _SHORT_B = 1.2, 0.75


def tokenize_texts(texts: Sequence[str], *, stem: bool = True) -> list[list[str]]:
    """Cut texts into lower-case words of two letters and more, without stop words, stemmed.

    Raises:
        MissingDependencyError: bm25s or PyStemmer is not installed.
    """
    bm25s, stemmer = _import_bm25s()
    tokens: list[list[str]] = bm25s.tokenize(
        list(texts),
        stopwords=_STOP_WORDS,
        stemmer=stemmer.stemWords if stem else None,
        return_ids=False,
        show_progress=False,
    )
    return tokens


class KeywordIndex:
    """BM25 over tokenised documents, as bm25s computes it (its default form, Lucene's).

    Args:
        tokens: of each document.
        k1: how soon a word's repetitions stop counting.
        b: how much long documents are marked down, 0 to 1.
    """

    def __init__(self, tokens: Sequence[list[str]], *, k1: float, b: float) -> None:
        if not any(tokens):
            raise DataError("documents: should hold at least one word to search for")
        self._num_documents = len(tokens)
        self._bm25 = _import_bm25s()[0].BM25(k1=k1, b=b)
        self._bm25.index(list(tokens), show_progress=False)

    def score(self, query: list[str]) -> Floats:
        """Score every document for a tokenised query; 0 where no word is found."""
        if not query:
            return np.zeros(self._num_documents)
        return np.asarray(self._bm25.get_scores(query), dtype=np.float64)


class SearchIndex:
    """Everything that can be known of a collection before anybody has asked.

    Args:
        documents: title and text of each, by id; either may be missing.
        k1, b: of BM25 over title and text.

    Attributes:
        ids: of the documents, in the order of their places.
        tokens: stemmed words of title and text.

    Raises:
        DataError: there is no document, or none with a word in it.
        MissingDependencyError: bm25s, PyStemmer or scikit-learn is not installed.
    """

    def __init__(
        self, documents: Mapping[str, Mapping[str, Value]], *, k1: float = 1.5, b: float = 0.75
    ) -> None:
        self.documents = dict(documents)
        self.ids = tuple(self.documents)
        self.k1, self.b = k1, b
        self.titles = [_text_of(fields, "title") for fields in self.documents.values()]
        self.texts = [_text_of(fields, "text") for fields in self.documents.values()]
        self.tokens = tokenize_texts(
            [f"{title} {text}" for title, text in zip(self.titles, self.texts, strict=True)]
        )
        self.title_tokens = tokenize_texts(self.titles)
        self._keywords: dict[tuple[float, float], KeywordIndex] = {}
        counts: dict[str, int] = {}
        for words in self.tokens:
            for word in set(words):
                counts[word] = counts.get(word, 0) + 1
        self._document_counts = counts

    def with_bm25(self, *, k1: float, b: float) -> "SearchIndex":
        """Return the same collection with other settings of BM25; what is computed is shared."""
        other = copy(self)
        other.k1, other.b = k1, b
        return other

    @property
    def keywords(self) -> KeywordIndex:
        """BM25 over titles and texts."""
        settings = (self.k1, self.b)
        if settings not in self._keywords:
            self._keywords[settings] = KeywordIndex(self.tokens, k1=self.k1, b=self.b)
        return self._keywords[settings]

    def rarity(self, word: str) -> float:
        """Inverse document frequency of a stemmed word, as BM25 has it; above 0."""
        count = self._document_counts.get(word, 0)
        return float(np.log1p((len(self.ids) - count + 0.5) / (count + 0.5)))

    def search(self, query: list[str], count: int, *, without: int | None = None) -> Ints:
        """Find the places of the best documents, best first; equal scores keep their order.

        Args:
            query: tokenised.
            count: how many at most.
            without: the place of a document that is left out.
        """
        scores = self.keywords.score(query)
        if without is not None:
            scores[without] = -np.inf
        found = np.argsort(-scores, kind="stable")[:count].astype(np.int64)
        kept: Ints = found[np.isfinite(scores[found])]
        return kept

    @cached_property
    def title_keywords(self) -> KeywordIndex | None:
        """BM25 over titles; nothing where no document has one."""
        if not any(self.title_tokens):
            return None
        return KeywordIndex(self.title_tokens, k1=_SHORT_K1, b=_SHORT_B)

    @cached_property
    def phrase_keywords(self) -> KeywordIndex | None:
        """BM25 over pairs of neighbouring words; nothing where no document has two."""
        pairs = [phrases_of(words) for words in self.tokens]
        return KeywordIndex(pairs, k1=_SHORT_K1, b=_SHORT_B) if any(pairs) else None

    @cached_property
    def _weights(self) -> tuple[Any, Any]:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ModuleNotFoundError as error:
            raise MissingDependencyError("scikit-learn", extra="eval") from error
        vectorizer = TfidfVectorizer(analyzer=_as_it_is, sublinear_tf=True)
        return vectorizer, vectorizer.fit_transform(self.tokens)

    @cached_property
    def _topics(self) -> tuple[Any, Floats]:
        from sklearn.decomposition import TruncatedSVD

        _, documents = self._weights
        count = min(NUM_TOPICS, min(documents.shape) - 1)
        # A collection of one document or word has no topics to tell apart.
        svd = TruncatedSVD(max(1, count), random_state=0)
        return svd, _unit(svd.fit_transform(documents))

    @property
    def word_weights(self) -> Any:
        """TF-IDF of the documents, a sparse matrix with a row of length 1 each."""
        return self._weights[1]

    @property
    def topic_weights(self) -> Floats:
        """Latent topics of the documents, a row of length 1 each (0 for an empty one)."""
        return self._topics[1]

    def weigh_words(self, query: list[str]) -> Any:
        """Give the TF-IDF of a tokenised query: a sparse row in the words of the collection."""
        return self._weights[0].transform([query])

    def weigh_topics(self, query: list[str]) -> Floats:
        """Place a tokenised query among the latent topics: a row of length 1, or 0."""
        row: Floats = _unit(self._topics[0].transform(self.weigh_words(query)))[0]
        return row


def phrases_of(words: Sequence[str]) -> list[str]:
    """Join neighbouring words."""
    return [f"{first} {second}" for first, second in pairwise(words)]


def _text_of(fields: Mapping[str, Value], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _as_it_is(words: list[str]) -> list[str]:
    return words


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.where(lengths > 0, lengths, 1.0)
    return unit


def _import_bm25s() -> tuple[Any, Any]:
    try:
        import bm25s
        import Stemmer
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            {"Stemmer": "PyStemmer"}.get(error.name or "", "bm25s"), extra="eval"
        ) from error
    # On import it asks for its own debug messages, whatever the program wants to log.
    logging.getLogger("bm25s").setLevel(logging.NOTSET)
    return bm25s, Stemmer.Stemmer("english")
