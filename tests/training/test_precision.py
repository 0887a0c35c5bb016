"""Training in bf16 and FP8: close to fp32, with head, loss and weights in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rankonce.errors import TrainingError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import Head
from rankonce.model.loading import use_segment_attention
from rankonce.training.fp8 import check_fp8, train_in_fp8
from rankonce.training.loop import TrainConfig
from rankonce.training.objectives import LabelObjective, Learner, TokenObjective
from rankonce.training.parallel import ParallelLearner, Processes
from tests.conftest import ARCHITECTURES, build_network
from tests.training.test_gradients import build_examples
from tests.training.test_sequences import build_sequences


def run_pass(
    architecture: str, objective: Any, units: Any, *, precision: str, accelerates: bool = True
) -> tuple[float, list[torch.Tensor]]:
    network = build_network(architecture)
    use_segment_attention(network)
    if accelerates:
        accelerate_model(network, trainable=True)
    learner = ParallelLearner(
        Learner(network, objective), Processes(), precision=precision, max_tokens_per_pass=1000
    )
    sums = learner.accumulate_gradients(units)
    return sums.loss, [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("accelerates", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_losses_and_gradients_are_close_to_fp32(
    tokenizer: Any, architecture: str, accelerates: bool
) -> None:
    for objective, units in (
        (LabelObjective(), build_examples(tokenizer)),
        (TokenObjective(), build_sequences()),
    ):
        options: Any = {"accelerates": accelerates}
        exact, expected = run_pass(architecture, objective, units, precision="fp32", **options)
        loss, gradients = run_pass(architecture, objective, units, precision="bf16", **options)
        assert loss != exact
        # Weights of these models are ten times those of a trained one: rounding shows.
        assert loss == pytest.approx(exact, rel=0.03)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        flat, flat_expected = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, expected))
        assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.98


@pytest.mark.parametrize("accelerates", [True, False])
def test_the_head_is_not_rounded_in_bf16(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, accelerates: bool
) -> None:
    seen = []
    label_logprobs = Head.label_logprobs

    def watch(self: Head, hidden_CD: torch.Tensor, label_ids: Any) -> torch.Tensor:
        log_probs_CL = label_logprobs(self, hidden_CD, label_ids)
        weight_LD = self.weight_VD[[ids[0] for ids in label_ids]].double()
        exact_CL = (hidden_CD.double() @ weight_LD.T).log_softmax(1)
        seen.append((hidden_CD.dtype, log_probs_CL.detach(), exact_CL.detach()))
        return log_probs_CL

    monkeypatch.setattr(Head, "label_logprobs", watch)
    run_pass(
        *("qwen3", LabelObjective(), build_examples(tokenizer)),
        precision="bf16",
        accelerates=accelerates,
    )
    for dtype, log_probs_CL, exact_CL in seen:
        assert dtype == torch.float32
        assert log_probs_CL.dtype == torch.float32
        # A bf16 product would differ by about a hundredth.
        torch.testing.assert_close(log_probs_CL.double(), exact_CL, atol=2e-5, rtol=0)


def test_fp8_products_are_close_and_their_gradients_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    rows_TD = torch.randn(63, 48, requires_grad=True)
    linear = nn.Linear(48, 80)
    plain = linear(rows_TD)
    network = nn.Module()
    network.base_model = nn.Module()
    network.base_model.layers = nn.ModuleList([linear, nn.Linear(48, 7)])
    assert train_in_fp8(network) == 1
    out_TN = linear(rows_TD)
    error = (out_TN - plain).detach().norm() / plain.detach().norm()
    assert 0.005 < error < 0.05
    weights_TN = torch.randn_like(out_TN)
    parameters = [rows_TD, linear.weight, linear.bias]
    actual = torch.autograd.grad((out_TN * weights_TN).sum(), parameters)
    expected = torch.autograd.grad((plain * weights_TN).sum(), parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp8_training_lowers_the_loss(tokenizer: Any, precision: str) -> None:
    network = build_network("llama")
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    assert train_in_fp8(network) == 3 * 7
    learner = ParallelLearner(
        Learner(network, LabelObjective()),
        Processes(),
        precision=precision,
        max_tokens_per_pass=1000,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(learner.accumulate_gradients(build_examples(tokenizer)).loss)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_fp8_without_a_device_for_it_is_refused() -> None:
    with pytest.raises(TrainingError, match="fp8: needs a GPU with FP8 products"):
        check_fp8(torch.device("cpu"))


@pytest.mark.parametrize("name", ["schedule", "precision", "sharding"])
def test_an_unknown_choice_is_named(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name}: should be one of .* is 'x'"):
        replace(TrainConfig(), **{name: "x"})
