"""Questions that wait together share a pass, and none of them notices."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
import torch

from rankonce.errors import NumericsError
from rankonce.layout import TokenizedRequest
from rankonce.ranker import RankerConfig, RawScores
from rankonce.serving.batcher import Batcher
from tests.conftest import build_request
from tests.serving.conftest import Served


class RecordingRanker:
    """Answers with the first token of each segment and fails on requests that hold token 666."""

    def __init__(self) -> None:
        self.config = RankerConfig(max_tokens_per_pass=40)
        self.calls: list[int] = []
        self.wanted: list[tuple[bool, int]] = []

    def forward(
        self, requests: Sequence[TokenizedRequest], *, label_mass: bool, num_top: int
    ) -> list[RawScores]:
        self.calls.append(len(requests))
        self.wanted.append((label_mass, num_top))
        if any(666 in segment for request in requests for segment in request.segment_ids):
            raise NumericsError("token 666")
        return [
            RawScores(labels_CL=torch.tensor([[float(ids[0])] for ids in request.segment_ids]))
            for request in requests
        ]


def request_of(*token_ids: int) -> TokenizedRequest:
    return TokenizedRequest(prefix_ids=(), segment_ids=(token_ids,), label_ids=((0,),))


def run_together(ranker: Any, questions: Sequence[Sequence[TokenizedRequest]]) -> list[Any]:
    async def run() -> list[Any]:
        batcher = Batcher(ranker)
        async with batcher.running():
            forwards = [batcher.forward(question) for question in questions]
            return await asyncio.gather(*forwards, return_exceptions=True)

    return asyncio.run(run())


def test_questions_that_wait_together_share_a_pass() -> None:
    ranker = RecordingRanker()
    answers = run_together(ranker, [[request_of(i), request_of(10 + i)] for i in range(5)])
    assert ranker.calls == [10]
    for index, raws in enumerate(answers):
        assert [raw.labels_CL.item() for raw in raws] == [index, 10 + index]


def test_a_pass_computes_what_any_of_its_questions_wants() -> None:
    async def run(ranker: RecordingRanker) -> None:
        batcher = Batcher(ranker)  # type: ignore[arg-type]
        async with batcher.running():
            await asyncio.gather(
                batcher.forward([request_of(1)]),
                batcher.forward([request_of(2)], label_mass=True),
                batcher.forward([request_of(3)], num_top=5),
                batcher.forward([request_of(4)], num_top=2),
            )

    ranker = RecordingRanker()
    asyncio.run(run(ranker))
    assert ranker.wanted == [(True, 5)]


def test_a_full_pass_leaves_the_others_for_the_next() -> None:
    ranker = RecordingRanker()
    answers = run_together(ranker, [[request_of(*range(i, i + 20))] for i in range(5)])
    assert ranker.calls == [2, 2, 1]
    assert [raw.labels_CL.item() for (raw,) in answers] == list(range(5))


def test_a_question_that_fails_does_not_fail_its_neighbours() -> None:
    ranker = RecordingRanker()
    answers = run_together(ranker, [[request_of(1)], [request_of(666)], [request_of(3)]])
    assert ranker.calls == [3, 1, 1, 1]
    assert isinstance(answers[1], NumericsError)
    assert answers[0][0].labels_CL.item() == 1
    assert answers[2][0].labels_CL.item() == 3


def test_a_question_that_nobody_waits_for_is_forgotten() -> None:
    async def run() -> Any:
        batcher = Batcher(RecordingRanker())  # type: ignore[arg-type]
        async with batcher.running():
            given_up = asyncio.create_task(batcher.forward([request_of(1)]))
            await asyncio.sleep(0)
            given_up.cancel()
            return await batcher.forward([request_of(2)])

    assert asyncio.run(run())[0].labels_CL.item() == 2


@pytest.mark.parametrize("num_threads", [8])
def test_concurrent_questions_get_the_answers_they_get_alone(
    plain: Served, num_threads: int
) -> None:
    questions: list[tuple[str, Any]] = []
    for seed in range(6):
        questions += [
            ("/v1/rank", asdict(build_request(1 + 9 * seed, seed=seed))),
            ("/v1/completions", {"prompt": f"M {seed}", "max_tokens": 1, "logprobs": seed % 6}),
            ("/v1/score", {"query": f"M {seed}", "items": [" a", " b"], "label_token_ids": [9, 8]}),
            ("/v1/rank", {"task": "movie-like", "candidates": [{"fields": {}}]}),
        ]

    def ask(question: tuple[str, Any]) -> tuple[int, Any]:
        response = plain.http.post(question[0], json=question[1])
        return response.status_code, response.json()

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(num_threads) as pool:
        together = list(pool.map(ask, questions))
    for (status, answer), (status_alone, answer_alone) in zip(together, alone, strict=True):
        assert status == status_alone
        assert _numbers(answer) == pytest.approx(_numbers(answer_alone), abs=1e-5)


def _numbers(answer: Any) -> list[float]:
    """Every score of an answer, in order."""
    if "error" in answer:
        return []
    if "scores" in answer:
        return [value for row in answer["scores"] for value in row]
    if "results" in answer:
        return [value for one in answer["results"] for value in one["log_probs"].values()]
    return [
        value for one in answer["choices"] for value in one["logprobs"]["top_logprobs"][0].values()
    ]
