"""Label log-probabilities: FP32 at any dtype, over the labels or the whole vocabulary."""

import pytest
import torch

from rankonce.errors import ShapeError
from rankonce.kernels.label_logprobs import label_logprobs, vocabulary_logprobs

LABELS = ((3,), (7, 11), (20_000,))


def build(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(63, 48, generator=generator),
        torch.randn(20_001, 48, generator=generator),
    )
    return hidden.to(dtype), weight.to(dtype), torch.randn(20_001, generator=generator).to(dtype)


def gather_labels(logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([logits[:, list(ids)].logsumexp(1) for ids in LABELS], dim=1)


def test_labels_are_normalised_among_themselves_with_their_surface_forms_added() -> None:
    hidden, weight, bias = build()
    logits = hidden @ weight.T + bias
    expected = gather_labels(logits).log_softmax(1)
    torch.testing.assert_close(label_logprobs(hidden, weight, LABELS, bias_V=bias), expected)


def test_gradients_are_those_of_the_full_product() -> None:
    hidden, weight, _ = build()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = label_logprobs(hidden, weight, LABELS)[:, 1].sum()
    expected = gather_labels(hidden @ weight.T).log_softmax(1)[:, 1].sum()
    for actual, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_the_streamed_vocabulary_equals_the_stored_one() -> None:
    hidden, weight, bias = build()
    full = (hidden @ weight.T + bias).log_softmax(1)
    scores = vocabulary_logprobs(hidden, weight, LABELS, num_top=20, bias_V=bias)
    torch.testing.assert_close(scores.labels_CL, gather_labels(full))
    top = full.topk(20, dim=1)
    torch.testing.assert_close(scores.top_logprobs_CN, top.values)
    assert torch.equal(scores.top_ids_CN, top.indices)


def test_softcap_applies_to_labels_and_vocabulary() -> None:
    hidden, weight, _ = build()
    full = (5 * torch.tanh(hidden @ weight.T / 5)).log_softmax(1)
    torch.testing.assert_close(
        vocabulary_logprobs(hidden, weight, LABELS, softcap=5.0).labels_CL, gather_labels(full)
    )
    torch.testing.assert_close(
        label_logprobs(hidden, weight, LABELS, softcap=5.0), gather_labels(full).log_softmax(1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_are_widened_before_the_product(dtype: torch.dtype) -> None:
    hidden, weight, _ = build(dtype)
    expected = label_logprobs(hidden.double(), weight.double(), LABELS)
    scores = label_logprobs(hidden, weight, LABELS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=0)


def test_scores_near_a_high_logit_stay_distinct_where_a_16_bit_head_collapses() -> None:
    # Logits around 18, as trained rankers have them; the step of bf16 there is 0.0625 or more.
    generator = torch.Generator().manual_seed(1)
    hidden = torch.ones(5000, 8) + torch.rand(5000, 8, generator=generator) * 0.02
    weight = torch.full((2, 8), 2.25)
    weight[1] -= 0.1
    kept = label_logprobs(hidden.bfloat16(), weight.bfloat16(), ((0,), (1,)))[:, 0]
    narrow = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(1)[:, 0]
    assert len(narrow.unique()) < 10 < len(kept.unique())


@pytest.mark.parametrize(
    ("labels", "message"), [(((20_001,),), "ids below 20001"), (((1,), ()), "at least one a label")]
)
def test_label_ids_outside_the_head_are_named(
    labels: tuple[tuple[int, ...], ...], message: str
) -> None:
    hidden, weight, _ = build()
    with pytest.raises(ShapeError, match=message):
        label_logprobs(hidden, weight, labels)
