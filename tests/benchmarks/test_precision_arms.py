"""Arms: each differs from the others as it should, and a rounded head loses what it should."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankonce.benchmarks.precision_arms import ARMS, choose_arms, head_logprobs, score_arms
from rankonce.model.head import Head
from rankonce.model.loading import LoadedModel, load_model
from rankonce.ranker import Ranker
from tests.benchmarks.conftest import tokens_of


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_large_logits_collapse_in_a_rounded_head(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_CD = torch.randn(500, 64, generator=generator).bfloat16()
    weight_VD = 0.02 * torch.randn(48, 64, generator=generator).bfloat16()
    head = Head(weight_VD=weight_VD, bias_V=torch.full((48,), 18.0).bfloat16())
    labels = ((7,), (31,))

    def distinct_ratio(head: Head, kind: str, shift: float = 0.0) -> float:
        return (
            len(set(head_logprobs(head, kind, hidden_CD, labels, shift=shift)[:, 0].tolist())) / 500
        )

    assert distinct_ratio(head, "fp32") > 0.99
    assert distinct_ratio(head, kind) < 0.03
    # The same head without its bias, its logits moved there by the arm.
    assert distinct_ratio(replace(head, bias_V=None), kind) > 0.5
    assert distinct_ratio(replace(head, bias_V=None), kind, shift=18.0) < 0.03


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_rounded_head_is_near_ours(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_CD = torch.randn(63, 64, generator=generator)
    head = Head(
        weight_VD=0.1 * torch.randn(40, 64, generator=generator),
        bias_V=torch.randn(40, generator=generator),
        softcap=5.0,
    )
    labels = ((1, 17), (39,), (2, 3, 4))
    expected_CL = head.label_logprobs(hidden_CD, labels)
    logprobs_CL = head_logprobs(head, kind, hidden_CD, labels)
    torch.testing.assert_close(logprobs_CL, expected_CL, atol=0.15, rtol=0)
    assert (logprobs_CL - expected_CL).abs().max() > 1e-4
    torch.testing.assert_close(logprobs_CL.exp().sum(dim=1), torch.ones(63))


@pytest.fixture
def checkpoint(tmp_path: Path, load_random: Callable[..., LoadedModel], tokenizer: Any) -> Path:
    folder = tmp_path / "random"
    load_random("qwen3").network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_arm_runs_and_differs_as_it_should(checkpoint: Path) -> None:
    requests = [tokens_of(63, seed=1), tokens_of(5, seed=2)]
    arms = choose_arms(tuple(ARMS), ["*.down_proj", "model.layers.*"])

    def load(activations: str) -> LoadedModel:
        return load_model(checkpoint, device="cpu", precision=activations)

    scores, largest = score_arms(load, arms, requests, max_tokens_per_pass=16_384)
    assert set(scores) == set(arms)
    assert largest > 0
    assert [len(part) for part in scores["fp8"]] == [63, 5]
    ours = load("fp32")
    for name in set(arms) - {"fp32"}:
        assert not np.array_equal(scores[name][0], scores["fp32"][0]), name
    (raw,) = Ranker(ours).forward(requests[:1])
    np.testing.assert_allclose(scores["fp32"][0], raw.labels_CL.numpy(), atol=1e-5)
    # What a CPU serves as FP8.
    (raw,) = Ranker(load_model(checkpoint, device="cpu", precision="fp8")).forward(requests[:1])
    np.testing.assert_allclose(scores["fp8-over-fp32"][0], raw.labels_CL.numpy(), atol=1e-5)
    # FP8 that keeps every layer is bf16.
    np.testing.assert_array_equal(scores["fp8 keeping model.layers.*"][0], scores["bf16"][0])
    assert not np.array_equal(scores["fp8 keeping *.down_proj"][0], scores["fp8"][0])


def test_a_request_that_is_cut_scores_as_a_whole_one(checkpoint: Path) -> None:
    requests = [tokens_of(5, seed=3), tokens_of(63, seed=1), tokens_of(9, seed=2)]

    def load(activations: str) -> LoadedModel:
        return load_model(checkpoint, device="cpu", precision=activations)

    arms = {"fp32": ARMS["fp32"]}
    whole, _ = score_arms(load, arms, requests, max_tokens_per_pass=16_384)
    cut, _ = score_arms(load, arms, requests, max_tokens_per_pass=50)
    for expected, scores in zip(whole["fp32"], cut["fp32"], strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-5)
