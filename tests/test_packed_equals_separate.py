"""The house law: many candidates in one pass score as each does alone, on every architecture."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rankonce.errors import TaskError
from rankonce.model.loading import LoadedModel, prepare_model
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import CandidateScore, ScoreRequest, ScoreResult
from tests.conftest import ARCHITECTURES, build_network, build_request

TOLERANCE = 1e-5  # of log-probabilities in fp32
Load = Callable[[str], LoadedModel]

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def ranker_of(model: LoadedModel, **config: Any) -> Ranker:
    return Ranker(model, config=RankerConfig(**{"prefix_cache_mb": 0, **config}))


def score_alone(ranker: Ranker, request: ScoreRequest) -> list[CandidateScore]:
    return [
        ranker.score(replace(request, candidates=(candidate,))).candidates[0]
        for candidate in request.candidates
    ]


def assert_same(scores: Sequence[CandidateScore], expected: Sequence[CandidateScore]) -> None:
    assert [score.id for score in scores] == [score.id for score in expected]
    for score, other in zip(scores, expected, strict=True):
        assert score.log_probs == pytest.approx(other.log_probs, abs=TOLERANCE, rel=0)


def mean_difference(result: ScoreResult, other: ScoreResult) -> float:
    pairs = zip(result.candidates, other.candidates, strict=True)
    return sum(abs(a.value - b.value) for a, b in pairs) / len(result.candidates)


@architectures
def test_candidates_in_one_pass_score_as_each_does_alone(
    load_random: Load, architecture: str
) -> None:
    ranker = ranker_of(load_random(architecture))
    request = build_request(23)
    result = ranker.score(request)
    assert result.usage.computed_tokens == result.usage.prompt_tokens
    assert_same(result.candidates, score_alone(ranker, request))


@architectures
def test_candidate_order_does_not_change_scores(load_random: Load, architecture: str) -> None:
    ranker = ranker_of(load_random(architecture))
    request = build_request(23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = replace(request, candidates=tuple(request.candidates[i] for i in order))
    scores = ranker.score(shuffled).candidates
    expected = ranker.score(request).candidates
    assert_same(scores, [expected[i] for i in order])


@architectures
def test_other_requests_in_the_pass_do_not_change_scores(
    load_random: Load, architecture: str
) -> None:
    ranker = ranker_of(load_random(architecture), max_tokens_per_pass=100_000)
    requests = [build_request(count, seed=seed) for seed, count in enumerate((1, 7, 63, 2))]
    together = list(ranker.score_many(requests, progress=False))
    for request, result in zip(requests, together, strict=True):
        assert_same(result.candidates, ranker.score(request).candidates)


@architectures
def test_a_request_cut_into_passes_scores_as_in_one(load_random: Load, architecture: str) -> None:
    model = load_random(architecture)
    request = build_request(40)
    whole = ranker_of(model, max_tokens_per_pass=100_000).score(request)
    cut = ranker_of(model, max_tokens_per_pass=450).score(request)
    assert cut.usage.computed_tokens == whole.usage.computed_tokens
    assert_same(cut.candidates, whole.candidates)


@architectures
def test_a_cached_prefix_gives_the_scores_of_a_fresh_one(
    load_random: Load, architecture: str
) -> None:
    ranker = ranker_of(load_random(architecture), prefix_cache_mb=64)
    request = build_request(23)
    fresh, cached = ranker.score(request), ranker.score(request)
    assert fresh.usage.cached_tokens == 0
    assert cached.usage.cached_tokens > 0
    assert cached.usage.cached_tokens + cached.usage.computed_tokens == cached.usage.prompt_tokens
    assert_same(cached.candidates, fresh.candidates)


@architectures
def test_a_prefix_cached_in_part_gives_the_scores_of_a_fresh_one(
    load_random: Load, architecture: str
) -> None:
    """A history that has grown since, and another member with the same instruction."""
    model = load_random(architecture)
    ranker, fresh = ranker_of(model, prefix_cache_mb=64), ranker_of(model)
    request = build_request(23)
    ranker.score(replace(request, history=request.history[:-2]))
    for changed in (request, replace(request, profile={"num_ratings": 3, "like_share": 0.5})):
        result = ranker.score(changed)
        assert 0 < result.usage.cached_tokens < result.usage.separate_tokens / 23
        assert (
            result.usage.cached_tokens + result.usage.computed_tokens == result.usage.prompt_tokens
        )
        assert_same(result.candidates, fresh.score(changed).candidates)
    again = ranker.score(request)
    assert again.usage.cached_tokens == len(ranker.prepare(request).rendered.tokens.prefix_ids)
    assert_same(again.candidates, fresh.score(request).candidates)


@architectures
def test_a_request_cut_behind_a_prefix_cached_in_part_scores_as_a_fresh_one(
    load_random: Load, architecture: str
) -> None:
    model = load_random(architecture)
    ranker = ranker_of(model, prefix_cache_mb=64, max_tokens_per_pass=450)
    request = build_request(40)
    ranker.score(replace(request, history=request.history[:-2], candidates=request.candidates[:1]))
    assert_same(
        ranker.score(request).candidates,
        ranker_of(model, max_tokens_per_pass=100_000).score(request).candidates,
    )


@architectures
def test_different_candidates_never_share_a_score(load_random: Load, architecture: str) -> None:
    result = ranker_of(load_random(architecture)).score(build_request(200))
    assert result.distinct_score_ratio == 1.0
    assert not result.warnings


@architectures
def test_scores_equal_plain_transformers_on_the_rendered_text(
    load_random: Load, architecture: str, tokenizer: Any
) -> None:
    ranker = ranker_of(load_random(architecture))
    request = build_request(9)
    rendered = ranker.prepare(request).rendered
    label_ids = [ids[0] for ids in rendered.tokens.label_ids]
    plain = build_network(architecture)
    for score, segment in zip(ranker.score(request).candidates, rendered.segments, strict=True):
        encoded = tokenizer(
            rendered.prefix + segment, add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            logits = plain(encoded.input_ids).logits[0, -1, label_ids].double()
        assert list(score.log_probs.values()) == pytest.approx(
            logits.log_softmax(-1).tolist(), abs=TOLERANCE, rel=0
        )


def test_a_bad_request_does_not_cost_the_answers_before_it(load_random: Load) -> None:
    requests = [build_request(2, seed=1), build_request(3, seed=2), build_request(1)]
    requests[2] = replace(requests[2], task="nobody-defined-this")
    stream = ranker_of(load_random("llama")).score_many(requests, progress=False)
    assert [len(next(stream).candidates) for _ in range(2)] == [2, 3]
    with pytest.raises(TaskError, match="nobody-defined-this"):
        next(stream)


def test_500_candidates_share_one_prefill(load_random: Load) -> None:
    ranker = ranker_of(load_random("qwen3"), max_tokens_per_pass=100_000)
    request = build_request(500)
    result = ranker.score(request)
    prefix_tokens = len(ranker.prepare(request).rendered.tokens.prefix_ids)
    assert result.usage.separate_tokens - result.usage.computed_tokens == 499 * prefix_tokens
    few = replace(request, candidates=request.candidates[::100])
    assert_same(result.candidates[::100], ranker.score(few).candidates)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_bf16_packed_is_no_further_from_fp32_than_twice_bf16_alone(
    load_random: Load, architecture: str, tokenizer: Any
) -> None:
    network = build_network(architecture).to(torch.bfloat16)
    low = ranker_of(prepare_model(network, tokenizer, name="bf16"))
    exact = ranker_of(
        prepare_model(
            build_network(architecture).to(torch.bfloat16).float(), tokenizer, name="fp32"
        )
    )
    request = build_request(40)
    expected = exact.score(request)
    alone = replace(expected, candidates=tuple(score_alone(low, request)))
    assert mean_difference(low.score(request), expected) <= 2 * mean_difference(alone, expected)
