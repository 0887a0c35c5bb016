"""What every engine must do: the five first tasks, few and many candidates, usage, ranking."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce.errors import ModelError, PromptTooLongError, RequestError
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import PreparedRequest
from rankonce.records import ScoreResult
from rankonce.serving.backends.opening import EngineOptions, open_ranker
from rankonce.serving.engine import ServerConfig
from rankonce.serving.warm_up import rank_question
from tests.serving.backends.conftest import Engine
from tests.serving.backends.engine_server import Plain
from tests.serving.conftest import serving

TASKS = ("movie-like", "movie-rating", "job-apply", "similar-item", "search-relevance")


def question_of(task: str, num_candidates: int) -> Any:
    return rank_question(library_tasks()[task], num_candidates=num_candidates)


def expect(plain: Plain, prepared: PreparedRequest) -> torch.Tensor:
    """Log-probabilities of the labels in the whole vocabulary, one prompt a candidate."""
    tokens = prepared.rendered.tokens
    rows = plain.logprobs([tokens.prefix_ids + segment for segment in tokens.segment_ids])
    return torch.stack([rows[:, list(forms)].logsumexp(dim=1) for forms in tokens.label_ids], dim=1)


def check_ranks(result: ScoreResult, expected: Sequence[float], tolerance: float) -> None:
    """The order is that of plain transformers, but for those that differ by less than tolerance."""
    in_order = sorted(zip(result.candidates, expected, strict=True), key=lambda pair: pair[0].rank)
    values = [value for _, value in in_order]
    for better, worse in pairwise(values):
        assert better >= worse - tolerance


@pytest.mark.parametrize("num_candidates", [1, 50, 500])
@pytest.mark.parametrize("name", TASKS)
def test_scores_ranks_and_usage_are_those_of_plain_transformers(
    engine: Engine, plain: Plain, name: str, num_candidates: int
) -> None:
    ranker = engine.ranker
    prepared = ranker.prepare(question_of(name, num_candidates), is_checked=True)
    (raw,) = ranker.forward([prepared.rendered.tokens], label_mass=True)
    result = ranker.finish(prepared, raw)
    whole = expect(plain, prepared)
    expected = whole.log_softmax(dim=1)
    found = torch.tensor([list(one.log_probs.values()) for one in result.candidates])
    assert found.shape == (num_candidates, len(prepared.task.labels))
    assert float((found - expected).abs().max()) <= engine.tolerance
    assert raw.mass_C is not None
    assert float((raw.mass_C - whole.logsumexp(dim=1)).abs().max()) <= engine.tolerance
    rows = [dict(zip(prepared.task.label_names, row, strict=True)) for row in expected.tolist()]
    values = [prepared.task.ranking_value(row) for row in rows]
    # A rating is a sum of up to five classes' values.
    check_ranks(result, values, 20 * engine.tolerance)
    tokens, usage = prepared.rendered.tokens, result.usage
    packed = len(tokens.prefix_ids) + sum(map(len, tokens.segment_ids))
    assert usage.prompt_tokens == packed
    assert usage.separate_tokens == tokens.separate_tokens
    assert 0 < usage.computed_tokens <= usage.separate_tokens + num_candidates + 1
    if engine.tells_cached and engine.name != "native":
        assert usage.computed_tokens + usage.cached_tokens == usage.separate_tokens
        # The prefix is computed once, but for the block in which it ends.
        assert usage.computed_tokens <= packed + 128 * num_candidates


def test_requests_asked_together_have_their_own_scores(engine: Engine, plain: Plain) -> None:
    ranker = engine.ranker
    prepared = [
        ranker.prepare(question_of(name, 7 + place), is_checked=True)
        for place, name in enumerate(TASKS)
    ]
    raws = ranker.forward([one.rendered.tokens for one in prepared])
    for one, raw in zip(prepared, raws, strict=True):
        expected = expect(plain, one).log_softmax(dim=1)
        assert float((raw.labels_CL - expected).abs().max()) <= engine.tolerance


def test_a_request_longer_than_a_pass_is_cut(engine: Engine, plain: Plain) -> None:
    ranker = engine.ranker
    prepared = ranker.prepare(question_of("movie-like", 63), is_checked=True)
    tokens = prepared.rendered.tokens
    room = len(tokens.prefix_ids) + 5 * len(tokens.segment_ids[0])
    (raw,) = ranker.scorer.forward([tokens], max_tokens_per_pass=room)
    expected = expect(plain, prepared).log_softmax(dim=1)
    assert float((raw.labels_CL - expected).abs().max()) <= engine.tolerance


def test_a_label_of_several_tokens_counts_them_all(engine: Engine, plain: Plain) -> None:
    prepared = engine.ranker.prepare(question_of("movie-like", 3), is_checked=True)
    tokens = replace(prepared.rendered.tokens, label_ids=((5, 6, 7), (8,)))
    prepared = replace(prepared, rendered=replace(prepared.rendered, tokens=tokens))
    (raw,) = engine.ranker.forward([tokens])
    expected = expect(plain, prepared).log_softmax(dim=1)
    assert float((raw.labels_CL - expected).abs().max()) <= engine.tolerance


def test_more_labels_than_one_question_takes(engine: Engine, plain: Plain) -> None:
    prepared = engine.ranker.prepare(question_of("movie-like", 2), is_checked=True)
    tokens = replace(prepared.rendered.tokens, label_ids=tuple((token,) for token in range(3, 303)))
    prepared = replace(prepared, rendered=replace(prepared.rendered, tokens=tokens))
    (raw,) = engine.ranker.forward([tokens])
    expected = expect(plain, prepared).log_softmax(dim=1)
    assert float((raw.labels_CL - expected).abs().max()) <= engine.tolerance


def test_the_most_probable_tokens(engine: Engine, plain: Plain) -> None:
    prepared = engine.ranker.prepare(question_of("movie-like", 3), is_checked=True)
    tokens = prepared.rendered.tokens
    if not engine.gives_top:
        with pytest.raises(RequestError, match="sglang gives those of labels alone"):
            engine.ranker.forward([tokens], num_top=5)
        return
    (raw,) = engine.ranker.forward([tokens], num_top=5)
    rows = plain.logprobs([tokens.prefix_ids + segment for segment in tokens.segment_ids])
    expected = rows.topk(5)
    assert raw.top_ids_CN is not None
    assert raw.top_logprobs_CN is not None
    assert raw.top_ids_CN.tolist() == expected.indices.tolist()
    assert float((raw.top_logprobs_CN - expected.values).abs().max()) <= engine.tolerance


def test_every_endpoint_answers(engine: Engine, plain: Plain) -> None:
    ranker = engine.ranker
    prepared = ranker.prepare(question_of("movie-like", 3), is_checked=True)
    tokens = prepared.rendered.tokens
    whole = expect(plain, prepared)
    label_ids = [forms[0] for forms in tokens.label_ids]
    texts = {"query": list(tokens.prefix_ids), "items": [list(ids) for ids in tokens.segment_ids]}
    with serving(ranker, served_model_name="served") as http:
        assert http.get("/ready").json() == {"status": "ready"}
        body = {**texts, "label_token_ids": label_ids, "apply_softmax": False}
        scores = http.post("/v1/score", json=body).json()["scores"]
        assert torch.tensor(scores).log().sub(whole).abs().max() <= engine.tolerance
        body = {**texts, "label_token_ids": label_ids, "apply_softmax": True}
        data = http.post("/generative_scoring", json=body).json()["data"]
        expected = whole.softmax(dim=1)[:, 0].tolist()
        assert [one["score"] for one in data] == pytest.approx(expected, abs=engine.tolerance)
        rerank = {"query": "a film", "documents": ["Heat", "Alien", "Up"]}
        results = http.post("/v1/rerank", json=rerank).json()["results"]
        assert sorted(one["index"] for one in results) == [0, 1, 2]
        answer = http.post("/v1/completions", json={"prompt": "Heat", "max_tokens": 1})
        assert answer.status_code == (200 if engine.gives_top else 400), answer.text


def test_a_prompt_that_is_too_long_is_refused_by_name(engine: Engine) -> None:
    question = question_of("movie-like", 2)
    item = replace(question.candidates[1], fields={"title": "Heat " * 5000})
    with pytest.raises(PromptTooLongError, match=r"candidates\[1\]"):
        engine.ranker.score(replace(question, candidates=(question.candidates[0], item)))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_checkpoint_that_is_missing_is_named(kind: str, engine_url: str, tmp_path: Path) -> None:
    options = EngineOptions(engine=kind, url=engine_url)
    with (
        pytest.raises(ModelError, match=r"absent has no config\.json"),
        open_ranker(options, tmp_path / "absent"),
    ):
        pass


def test_many_questions_at_once_have_their_own_answers(engine: Engine, plain: Plain) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ranker = engine.ranker
    questions = [question_of(name, 3 + place) for place, name in enumerate(TASKS * 4)]
    with serving(ranker, served_model_name=ServerConfig().served_model_name) as http:

        def ask(question: Any) -> Any:
            body = {
                "task": question.task,
                "time": question.time,
                "profile": dict(question.profile),
                "history": [
                    {"item": {"fields": dict(e.item.fields)}, "action": e.action, "time": e.time}
                    for e in question.history
                ],
                "candidates": [{"fields": dict(one.fields)} for one in question.candidates],
            }
            return http.post("/v1/rank", json=body)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, questions))
    for question, answer in zip(questions, answers, strict=True):
        assert answer.status_code == 200, answer.text
        expected = expect(plain, ranker.prepare(question, is_checked=True)).log_softmax(dim=1)
        rows = sorted(answer.json()["results"], key=lambda one: one["index"])
        found = torch.tensor([list(one["log_probs"].values()) for one in rows])
        assert float((found - expected).abs().max()) <= engine.tolerance
