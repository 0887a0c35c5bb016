"""Label log-probabilities: FP32 at any dtype, over the labels or the whole vocabulary."""

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankonce.errors import ShapeError
from rankonce.kernels.label_logprobs import gradients, label_logprobs, vocabulary_logprobs
from rankonce.kernels.label_logprobs import triton as triton_path
from rankonce.kernels.label_logprobs.forms import place_forms
from rankonce.kernels.label_logprobs.gradients import OverLabels, OverVocabulary
from rankonce.kernels.label_logprobs.products import bfloat16_terms, product
from rankonce.kernels.label_logprobs.reference import (
    label_logprobs_reference,
    vocabulary_logprobs_reference,
)
from rankonce.kernels.label_logprobs.triton import (
    label_logprobs_triton,
    vocabulary_logprobs_triton,
)

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


# The Triton path, interpreted where there is no GPU, and what holds on every path.

SMALL_LABELS = ((3,), (7, 11), (1_002,))
KERNELS = {
    ("reference", "labels"): label_logprobs_reference,
    ("reference", "vocabulary"): vocabulary_logprobs_reference,
    ("triton", "labels"): label_logprobs_triton,
    ("triton", "vocabulary"): vocabulary_logprobs_triton,
}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
by_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
by_extent = pytest.mark.parametrize("extent", ["labels", "vocabulary"])
by_path = pytest.mark.parametrize("path", ["reference", "triton"])


def build_small(
    num_rows: int, size: int, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights and biases of a head with 1,003 tokens and logits of up to about 16."""
    generator = torch.Generator().manual_seed(num_rows + size)
    hidden = torch.randn(num_rows, size, generator=generator)
    weight = torch.randn(1_003, size, generator=generator) * 4 * size**-0.5
    bias = torch.randn(1_003, generator=generator)
    return hidden.to(device, dtypes[0]), weight.to(device, dtypes[1]), bias.to(device, dtypes[1])


def score(
    path: str,
    extent: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    labels: tuple[tuple[int, ...], ...] = SMALL_LABELS,
) -> torch.Tensor:
    """Run one path as the public functions do."""
    forms = place_forms(labels, hidden.device)
    kernel = KERNELS[path, extent]
    if extent == "labels":
        return OverLabels.apply(hidden, weight, bias, forms, softcap, kernel)
    return OverVocabulary.apply(hidden, weight, bias, forms, softcap, kernel)[0]


def score_stored(
    extent: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same in plain PyTorch, from a stored matrix of logits in ``dtype``."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if dtype == torch.float32:
        # The library's product of the operands as they are: tensor cores cut sums off.
        logits = logits + (product(hidden.detach(), weight.detach().T) - logits).detach()
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    among = torch.stack([logits[:, list(ids)].logsumexp(1) for ids in SMALL_LABELS], dim=1)
    return among.log_softmax(1) if extent == "labels" else among - logits.logsumexp(1)[:, None]


def measure(run: Any, operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return scores and the gradients of a mixture of them, in FP64."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    scores = run(*leaves)
    mixture = torch.linspace(-1, 2, scores.numel(), device=scores.device, dtype=torch.float64)
    gradients = torch.autograd.grad((scores.double() * mixture.view_as(scores)).sum(), leaves)
    assert [one.dtype for one in gradients] == [one.dtype for one in leaves]
    return [scores.detach().double(), *(gradient.double() for gradient in gradients)]


def assert_as_accurate(
    actual: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """Max error at most twice plain PyTorch's (FlashAttention), plus eight last bits of FP32."""
    for name, ours, theirs, truth in zip(
        ("scores", "hidden", "weight", "bias"), actual, plain, exact, strict=False
    ):
        assert ours.shape == truth.shape, name
        allowed = 2 * (theirs - truth).abs().max() + 1e-6 * truth.abs().max()
        error = (ours - truth).abs().max()
        assert error <= allowed, f"{name}: {error:.2e} where {allowed:.2e} is allowed"


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that what a kernel does not write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))


@by_path
@by_extent
@by_dtype
@pytest.mark.parametrize(
    ("num_rows", "size", "options"), [(1, 48, False), (63, 100, True), (63, 1024, False)]
)
@pytest.mark.usefixtures("nan_memory")
def test_values_and_gradients_keep_fp32(
    path: str,
    extent: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    num_rows: int,
    size: int,
    options: bool,
    device: str,
) -> None:
    hidden, weight, bias = build_small(num_rows, size, dtypes, device)
    softcap = 10.0 if options else None
    operands = (hidden, weight, bias) if options else (hidden, weight)

    def run(h: Any, w: Any, b: Any = None) -> torch.Tensor:
        return score(path, extent, h, w, b, softcap)

    def plain(dtype: torch.dtype) -> Any:
        return lambda h, w, b=None: score_stored(extent, h, w, b, softcap, dtype)

    actual = measure(run, operands)
    assert run(*operands).dtype == torch.float32
    exact = measure(plain(torch.float64), tuple(operand.double() for operand in operands))
    assert_as_accurate(actual, measure(plain(torch.float32), operands), exact)


@by_extent
def test_five_hundred_rows_are_cut_into_blocks(extent: str, device: str) -> None:
    hidden, weight, _ = build_small(500, 48, DTYPES["bf16"], device)
    torch.testing.assert_close(
        score("triton", extent, hidden, weight), score("reference", extent, hidden, weight)
    )


@by_path
@by_extent
def test_no_rows_give_no_scores(path: str, extent: str, device: str) -> None:
    hidden, weight, _ = build_small(2, 48, DTYPES["bf16"], device)
    assert score(path, extent, hidden[:0], weight).shape == (0, 3)


@pytest.mark.parametrize("max_splits", [1, 3])
@pytest.mark.usefixtures("nan_memory")
def test_a_split_may_hold_several_tiles_and_a_launch_a_part_of_the_rows(
    max_splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = build_small(63, 48, DTYPES["fp32-bf16"], device)
    whole = score("triton", "vocabulary", hidden, weight, bias)
    monkeypatch.setattr(triton_path, "_MAX_SPLITS", max_splits)
    monkeypatch.setattr(triton_path, "_ROWS_PER_LAUNCH", 40)
    parts = score("triton", "vocabulary", hidden, weight, bias)
    torch.testing.assert_close(parts, whole, atol=5e-6, rtol=0)


@by_extent
@by_dtype
def test_a_row_keeps_its_bits_whatever_rows_stand_beside_it(
    extent: str, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    # On the Triton path only: libraries choose another product for another number of rows.
    hidden, weight, bias = build_small(130, 48, dtypes, device)
    together = score("triton", extent, hidden, weight, bias, 10.0)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(score("triton", extent, hidden[order], weight, bias, 10.0), together[order])
    some = order[:37]
    assert torch.equal(score("triton", extent, hidden[some], weight, bias, 10.0), together[some])
    assert torch.equal(score("triton", extent, hidden[129:], weight, bias, 10.0), together[129:])


@by_extent
def test_rows_and_weights_may_be_views(extent: str, device: str) -> None:
    hidden, weight, _ = build_small(63, 96, DTYPES["bf16"], device)
    for rows, columns in ((hidden[::2, :48], weight[:, 48:]), (hidden[:48, ::2], weight[:, ::2])):
        torch.testing.assert_close(
            score("triton", extent, rows, columns), score("reference", extent, rows, columns)
        )


@by_path
@by_extent
def test_one_token_in_two_labels_counts_in_both(path: str, extent: str, device: str) -> None:
    hidden, weight, _ = build_small(7, 48, DTYPES["fp32"], device)
    operands, labels = (hidden.double(), weight.double()), [[3, 5], [5], [9]]

    def stored(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = h @ w.T
        among = torch.stack([logits[:, ids].logsumexp(1) for ids in labels], dim=1)
        return among.log_softmax(1) if extent == "labels" else among - logits.logsumexp(1)[:, None]

    actual = measure(lambda h, w: score(path, extent, h, w, labels=labels), (hidden, weight))
    for ours, truth in zip(actual, measure(stored, operands), strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-5)


@by_path
def test_a_bias_may_rule_tokens_out(path: str, device: str) -> None:
    hidden, weight, bias = build_small(7, 48, DTYPES["fp32"], device)
    bias[300:900] = -torch.inf
    kept = [*range(300), *range(900, 1_003)]
    expected = score("reference", "vocabulary", hidden, weight[kept], bias[kept], None, ((3,),))
    scores = score(path, "vocabulary", hidden, weight, bias, None, ((3,),))
    torch.testing.assert_close(scores, expected)


def test_many_label_forms_fit_one_tile(device: str) -> None:
    hidden, weight, _ = build_small(40, 48, DTYPES["bf16"], device)
    labels = tuple((i, i + 500) for i in range(100))
    torch.testing.assert_close(
        score("triton", "labels", hidden, weight, labels=labels),
        score("reference", "labels", hidden, weight, labels=labels),
    )


@pytest.mark.parametrize("function", [label_logprobs, vocabulary_logprobs])
def test_gradients_are_those_of_finite_differences(function: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (11, 4), (11,))
    ]

    def run(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = function(hidden, weight, ((1,), (2, 5)), bias_V=bias, softcap=3.0)
        return scores if isinstance(scores, torch.Tensor) else scores.labels_CL

    assert torch.autograd.gradcheck(run, operands)


def test_a_frozen_head_gets_no_gradient_and_its_rows_do(device: str) -> None:
    hidden, weight, bias = build_small(7, 48, DTYPES["bf16"], device)
    hidden.requires_grad_()
    scores = vocabulary_logprobs(hidden, weight, SMALL_LABELS, bias_V=bias, num_top=2)
    assert not scores.top_logprobs_CN.requires_grad
    scores.labels_CL.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_asking_for_top_tokens_changes_no_score(device: str) -> None:
    hidden, weight, _ = build_small(63, 48, DTYPES["bf16"], device)
    alone = vocabulary_logprobs(hidden, weight, SMALL_LABELS)
    scores = vocabulary_logprobs(hidden, weight, SMALL_LABELS, num_top=5)
    assert torch.equal(scores.labels_CL, alone.labels_CL)
    assert alone.top_ids_CN.shape == (63, 0)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@by_path
def test_logits_over_the_vocabulary_are_never_stored(
    path: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "_MAX_LOGITS", 2**14)
    hidden, weight, _ = build_small(150, 16, DTYPES["bf16"], device)
    hidden.requires_grad_(), weight.requires_grad_()
    place_forms(SMALL_LABELS, hidden.device)
    with LargestTensor() as forward:
        scores = score(path, "vocabulary", hidden, weight)
    with LargestTensor() as backward:
        scores.sum().backward()
    with LargestTensor() as top:
        vocabulary_logprobs(hidden, weight, SMALL_LABELS, num_top=5)
    # Nothing above the rows' logits for the shortest slice, not even the head's own gradient.
    limit, stored = 150 * 256, 150 * 1_003
    assert 0 < max(forward.num_elements, backward.num_elements, top.num_elements) <= limit < stored


def test_ids_reach_the_device_once_and_serve_training_after_inference() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        forms = place_forms([[40], [41, 42]], device)
    assert place_forms(((40,), (41, 42)), device) is forms
    assert not forms.ids_N.is_inference()
    assert (forms.ids, forms.labels) == ((40, 41, 42), (0, 1, 1))


def test_three_bf16_terms_hold_an_fp32_number() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator) * 10 ** torch.linspace(-20, 20, 10_000)
    terms = bfloat16_terms(x)
    assert torch.equal(sum(term.double() for term in terms), x.double())


def test_the_path_follows_the_device_and_is_logged_once(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    package = sys.modules["rankonce.kernels.label_logprobs"]
    package._log_path.cache_clear()
    caplog.set_level("INFO", logger=package.__name__)
    hidden, weight, _ = build_small(2, 48, DTYPES["bf16"], device)
    for _ in range(2):
        label_logprobs(hidden, weight, SMALL_LABELS)
    path = "triton" if device == "cuda" else "reference"
    assert [record.message for record in caplog.records] == [
        f"label_logprobs runs on its {path} path"
    ]
