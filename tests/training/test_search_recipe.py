"""Examples from a collection alone and from judged lists, and a small run of both stages."""

from pathlib import Path

import numpy as np
import pytest

from rankonce.datasets.search_evidence import View
from rankonce.datasets.search_index import SearchIndex
from rankonce.datasets.search_sets import make_fold
from rankonce.errors import DataError
from rankonce.evaluation.metrics import ndcg_at_k
from rankonce.training.loop import TrainConfig
from rankonce.training.search_recipe import (
    SearchConfig,
    collection_examples,
    judged_examples,
    pretrain,
    score_fold,
    score_requests,
)
from tests.search_collection import planted_set

CONFIG = SearchConfig(alike_per_list=2, drawn_per_list=3, unjudged_per_list=5)


def test_a_title_asks_for_documents_like_its_own() -> None:
    index = SearchIndex(planted_set().documents)
    examples = collection_examples(index, CONFIG, seed=0)
    # Every document has a title, and a text of one sentence.
    assert len(examples) == 2 * len(index.ids)
    titles = [example for example in examples[::2] if len(example.labels) == 5]
    for place, example in enumerate(titles):
        assert example.request.profile["query"] == index.titles[place]
        assert index.ids[place] not in {item.id for item in example.request.candidates}
    grades, same_subject = [], []
    for place, example in enumerate(titles):
        for item, label in zip(example.request.candidates, example.labels, strict=True):
            assert isinstance(label, dict)
            assert sum(label.values()) == pytest.approx(1.0)
            grades.append(sum(int(name) * share for name, share in label.items()))
            same_subject.append((int(str(item.id)[1:]) - place) % 12 == 0)
    assert np.mean(np.array(grades)[same_subject]) > 1 + np.mean(
        np.array(grades)[~np.array(same_subject)]
    )


def test_other_seeds_draw_other_sentences_and_candidates() -> None:
    index = SearchIndex(planted_set().documents)
    first = collection_examples(index, CONFIG, seed=0)
    assert first == collection_examples(index, CONFIG, seed=0)
    assert first != collection_examples(index, CONFIG, seed=1)


def test_judged_lists_keep_every_relevant_candidate() -> None:
    search_set = planted_set()
    fold = make_fold(
        search_set, SearchIndex(search_set.documents), ("q1",), number=0, num_candidates=40
    )
    examples = judged_examples(fold.train, CONFIG, seed=3)
    assert len(examples) == len(search_set.queries) - 1
    for one, example in zip(fold.train, examples, strict=True):
        relevant = {
            candidate.id
            for candidate, grade in zip(one.request.candidates, one.grades, strict=True)
            if grade
        }
        labels = dict(
            zip((item.id for item in example.request.candidates), example.labels, strict=True)
        )
        assert {name for name, label in labels.items() if label == "4"} == relevant
        assert list(labels.values()).count("0") == 5
        assert example.request.id == one.request.id


def test_a_collection_without_titles_and_sentences_is_refused() -> None:
    index = SearchIndex({"a": {"text": "lift"}, "b": {"text": "drag"}})
    with pytest.raises(DataError, match="should hold a title or a sentence"):
        collection_examples(index, CONFIG, seed=0)


def test_two_stages_learn_what_was_planted_and_are_not_run_again(tmp_path: Path) -> None:
    search_set = planted_set()
    index = SearchIndex(search_set.documents)
    stage = TrainConfig(epochs=2, targets_per_step=60, learning_rate=3e-3, seed=1)
    config = SearchConfig(
        view=View.EVIDENCE,
        alike_per_list=2,
        drawn_per_list=3,
        unjudged_per_list=8,
        pretraining=TrainConfig(epochs=1, targets_per_step=60, learning_rate=3e-3, seed=1),
        finetuning=stage,
    )
    test = ("q2", "q9", "q15", "q20")
    fold = make_fold(search_set, index, test, number=0, num_candidates=20)
    start = pretrain(index, tmp_path / "start", config)
    scores = score_fold(fold, tmp_path / "fold", config, pretrained=start)
    gains = [
        search_set.grades[str(request.id)].get(str(item.id), 0)
        for request in fold.test
        for item in request.candidates
    ]
    members = np.repeat(np.arange(4), 20)
    found = [-float(row) for _ in fold.test for row in range(20)]
    learnt = ndcg_at_k(gains, np.concatenate(scores), members, k=10)
    assert learnt > ndcg_at_k(gains, found, members, k=10) + 0.05
    again = score_fold(fold, tmp_path / "fold", config, pretrained=start)
    np.testing.assert_array_equal(np.concatenate(scores), np.concatenate(again))
    untouched = score_requests(start, fold.test, view=config.view)
    assert not np.allclose(np.concatenate(untouched), np.concatenate(scores))
