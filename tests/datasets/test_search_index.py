"""BM25, TF-IDF and topics of a collection."""

import bm25s
import numpy as np
import pytest
import Stemmer

from rankonce.datasets.search_index import KeywordIndex, SearchIndex, phrases_of, tokenize_texts
from rankonce.errors import DataError
from tests.search_collection import planted_set

DOCUMENTS = {
    "wing": {"title": "Lift of a wing", "text": "the lift and drag of thin wings in a slipstream"},
    "heat": {"title": "Heat transfer", "text": "heating of blunt bodies at hypersonic speed"},
    "bare": {"text": "boundary layers on wings"},
    "named": {"title": "Panel flutter"},
}


def test_words_are_stemmed_and_stop_words_left_out() -> None:
    assert tokenize_texts(["The wings are LIFTING a wing"]) == [["wing", "lift", "wing"]]
    assert tokenize_texts(["The wings", ""], stem=False) == [["wings"], []]


def test_bm25_scores_and_order_are_those_of_bm25s() -> None:
    search_set = planted_set()
    index = SearchIndex(search_set.documents, k1=2.0, b=0.5)
    texts = [f"{fields['title']} {fields['text']}" for fields in search_set.documents.values()]
    stemmer = Stemmer.Stemmer("english")
    peer = bm25s.BM25(k1=2.0, b=0.5)
    peer.index(
        bm25s.tokenize(texts, stopwords="english_plus", stemmer=stemmer, show_progress=False),
        show_progress=False,
    )
    for query in search_set.queries.values():
        words = bm25s.tokenize(
            query, stopwords="english_plus", stemmer=stemmer, show_progress=False, return_ids=False
        )
        _, scores = peer.retrieve(words, k=20, show_progress=False)
        found = index.search(words[0], 20)
        np.testing.assert_allclose(index.keywords.score(words[0])[found], scores[0], rtol=1e-6)


def test_a_search_can_leave_one_document_out() -> None:
    index = SearchIndex(DOCUMENTS)
    (words,) = tokenize_texts(["wing"])
    assert index.search(words, 2).tolist() == [0, 2]
    assert index.search(words, 4, without=0).tolist() == [2, 1, 3]


def test_a_query_without_a_known_word_scores_nothing() -> None:
    index = SearchIndex(DOCUMENTS)
    assert index.keywords.score([]).tolist() == [0.0] * 4
    assert index.keywords.score(["zeppelin"]).tolist() == [0.0] * 4
    assert np.abs(index.weigh_topics(["zeppelin"])).sum() == 0


def test_rare_words_weigh_more() -> None:
    index = SearchIndex(DOCUMENTS)
    assert index.rarity("zeppelin") > index.rarity("flutter") > index.rarity("wing") > 0


def test_other_settings_of_bm25_keep_everything_else() -> None:
    index = SearchIndex(DOCUMENTS)
    weights = index.word_weights
    other = index.with_bm25(k1=3.0, b=0.0)
    assert other.word_weights is weights
    assert (other.k1, other.b, index.k1, index.b) == (3.0, 0.0, 1.5, 0.75)
    fresh = SearchIndex(DOCUMENTS, k1=3.0, b=0.0)
    words = ["lift", "wing"]
    np.testing.assert_array_equal(other.keywords.score(words), fresh.keywords.score(words))
    assert not np.allclose(other.keywords.score(words), index.keywords.score(words))


def test_topics_bring_documents_of_one_subject_together() -> None:
    search_set = planted_set()
    index = SearchIndex(search_set.documents)
    rows = index.topic_weights
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0)
    query = index.weigh_topics(tokenize_texts(["subject3 matter3"])[0])
    best = np.argsort(-(rows @ query))[:7]
    assert {int(index.ids[place][1:]) % 12 for place in best.tolist()} == {3}


def test_phrases_are_neighbouring_words() -> None:
    assert phrases_of(["thin", "wing", "drag"]) == ["thin wing", "wing drag"]
    assert phrases_of(["thin"]) == []


def test_a_collection_without_a_word_is_refused() -> None:
    with pytest.raises(DataError, match="documents: should hold at least one word"):
        KeywordIndex([[], []], k1=1.5, b=0.75)
