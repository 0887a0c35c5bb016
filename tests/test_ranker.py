"""What ``Ranker.finish`` says of all candidates of a request together."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from rankonce.ranker import Ranker
from rankonce.records import ScoreResult
from tests.conftest import build_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from rankonce.model.loading import LoadedModel


@pytest.fixture(scope="module")
def ranker(load_random: "Callable[[str], LoadedModel]") -> Ranker:
    return Ranker(load_random("llama"))


def finish(ranker: Ranker, places: list[int], values: list[float]) -> ScoreResult:
    """Answer a request whose candidates are drawn from three and whose P(Yes) are given."""
    request = build_request(3)
    request = replace(request, candidates=tuple(request.candidates[place] for place in places))
    prepared = ranker.prepare(request)
    (raw,) = ranker.forward([prepared.rendered.tokens])
    yes = torch.tensor(values, dtype=torch.float64)
    raw.labels_CL = torch.stack([yes.log(), (1 - yes).log()], dim=1)
    return ranker.finish(prepared, raw)


def test_a_text_that_stands_twice_counts_once_though_its_last_bit_differs(ranker: Ranker) -> None:
    nudged = 0.5 + 2**-50
    result = finish(ranker, [0, 1, 0], [0.5, 0.25, nudged])
    assert result.candidates[0].value != result.candidates[2].value
    assert result.distinct_score_ratio == 1
    assert not result.warnings
    assert finish(ranker, [0, 0], [0.5, nudged]).distinct_score_ratio == 1


def test_different_candidates_of_one_score_lower_the_ratio_and_are_counted(ranker: Ranker) -> None:
    result = finish(ranker, [0, 1, 2, 0], [0.5, 0.5, 0.25, 0.5])
    assert result.distinct_score_ratio == pytest.approx(2 / 3)
    assert result.warnings == ("scores: 1 different candidates share a score with another one",)
