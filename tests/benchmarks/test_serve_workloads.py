import math
from dataclasses import replace

import pytest

from rankonce.benchmarks.serve_workloads import BENCH_SCORE, MEMBER, LoadWorkload, LoadWriter
from rankonce.errors import ModelError
from rankonce.ranker import Ranker, RankerConfig


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return Ranker.from_pretrained(config=RankerConfig(chat=False, prefix_cache_mb=0))


@pytest.mark.parametrize(
    "workload",
    [
        BENCH_SCORE,
        MEMBER,
        replace(MEMBER, prefix_tokens=301, num_candidates=3, candidate_tokens=17),
    ],
    ids=str,
)
def test_prefix_and_candidates_have_exactly_the_tokens_asked_for(
    ranker: Ranker, workload: LoadWorkload
) -> None:
    writer = LoadWriter(ranker, workload)
    tokenizer = ranker.model.tokenizer
    for number in (0, 1, 63):
        written = writer.write(number)
        assert len(written.items) == workload.num_candidates
        length = workload.prefix_tokens + workload.candidate_tokens
        for item in (written.items[0], written.items[-1]):
            assert len(tokenizer(written.query + item).input_ids) == length
        assert len(written.tokens.prefix_ids) == workload.prefix_tokens


def test_a_member_is_the_same_in_our_form_and_as_texts(ranker: Ranker) -> None:
    writer = LoadWriter(ranker, replace(MEMBER, prefix_tokens=500, num_candidates=7))
    written = writer.write(5)
    assert written.request is not None
    prepared = ranker.prepare(written.request)
    assert prepared.rendered.tokens == written.tokens
    assert not prepared.rendered.history.dropped
    result = ranker.score(written.request)
    offline = writer.score_offline(written)
    for candidate, row in zip(result.candidates, offline, strict=True):
        assert [candidate.log_probs[name] for name in written.label_names] == pytest.approx(row)
        assert sum(map(math.exp, row)) == pytest.approx(1.0, abs=1e-5)


def test_every_number_is_another_member_and_the_same_one_again(ranker: Ranker) -> None:
    writer = LoadWriter(ranker, replace(MEMBER, prefix_tokens=300, num_candidates=2))
    queries = [writer.write(number).query for number in range(5)]
    assert len(set(queries)) == 5
    assert writer.write(3).query == queries[3]


def test_lengths_that_the_task_cannot_have_are_refused(ranker: Ranker) -> None:
    with pytest.raises(ModelError, match="too little"):
        LoadWriter(ranker, replace(MEMBER, prefix_tokens=40)).write(0)
    with pytest.raises(ModelError, match="too little"):
        LoadWriter(ranker, replace(MEMBER, candidate_tokens=2)).write(0)
