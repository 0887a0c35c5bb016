"""Segment attention: values and gradients of the CPU path and of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankonce.errors import ShapeError
from rankonce.kernels.segment_attention import SegmentSpans, segment_attention
from rankonce.kernels.segment_attention.cpu import segment_attention_cpu
from rankonce.kernels.segment_attention.reference import segment_attention_reference
from rankonce.layout import PassPart, lay_out_pass
from rankonce.model.packing import spans_of

# Largest error by dtype, for standard normal input.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}

# A request: whether its prefix is cached, the prefix's tokens, the segments' tokens.
requests = st.tuples(
    st.booleans(),
    st.sampled_from([0, 1, 17, 63]),
    st.lists(st.sampled_from([1, 2, 5, 31, 64]), min_size=1, max_size=6),
)


def build_spans(layout: list[tuple[bool, int, list[int]]]) -> tuple[SegmentSpans, int, int]:
    parts = [
        PassPart(request=i, first=0, last=len(segments), cached=cached)
        for i, (cached, _, segments) in enumerate(layout)
    ]
    placed = lay_out_pass(parts, [r[1] for r in layout], [r[2] for r in layout])
    return spans_of(placed), placed.num_tokens, placed.num_keys


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SegmentSpans, scale: float
) -> torch.Tensor:
    """Softmax over a dense mask that is drawn pair by pair: independent of both paths."""
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for start, end, key_start, prefix_start, prefix_end in spans.rows():
        for row in range(start, end):
            seen[row, prefix_start:prefix_end] = True
            seen[row, key_start : key_start + row - start + 1] = True
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("thk,shk->hts", q, k.repeat_interleave(group, 1)) * scale
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shk->thk", weights, v.repeat_interleave(group, 1))


def random_inputs(
    num_tokens: int, num_keys: int, heads: int, groups: int, size: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + num_keys)
    shapes = [(num_tokens, heads, size), (num_keys, groups, size), (num_keys, groups, size)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(requests, min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    size=st.sampled_from([8, 24, 64]),
)
@pytest.mark.parametrize("path", [segment_attention_cpu, segment_attention_reference])
def test_values_and_gradients_are_those_of_a_dense_mask(path, layout, heads, size) -> None:
    spans, num_tokens, num_keys = build_spans(layout)
    inputs = random_inputs(num_tokens, num_keys, *heads, size, torch.float64)
    out = path(*inputs, spans, scale=0.3)
    expected = dense_attention(*inputs, spans, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted, atol=TOLERANCES[torch.float64], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_path_rounds_no_worse_than_its_dtype(dtype: torch.dtype) -> None:
    spans, num_tokens, num_keys = build_spans([(False, 63, [1, 63, 5, 20]), (True, 31, [2, 64])])
    inputs = random_inputs(num_tokens, num_keys, 4, 2, 32, dtype)
    exact = segment_attention_reference(*(x.double() for x in inputs), spans, scale=0.2)
    out = segment_attention(*inputs, spans, scale=0.2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCES[dtype], rtol=0)


def test_every_output_row_is_written_and_no_unseen_key_is_read() -> None:
    spans, num_tokens, num_keys = build_spans([(True, 9, [3, 4]), (True, 5, [2])])
    q, k, v = (x.detach() for x in random_inputs(num_tokens, num_keys, 2, 1, 8, torch.float64))
    before = segment_attention(q, k, v, spans, scale=1.0)
    assert torch.isfinite(before).all()
    # The second request's prefix and tokens become NaN: the first request must not notice.
    k[9:14], v[9:14] = torch.nan, torch.nan
    k[-2:], v[-2:] = torch.nan, torch.nan
    after = segment_attention(q, k, v, spans, scale=1.0)
    assert torch.equal(after[:7], before[:7])
    assert torch.isnan(after[7:]).all()


def test_softcap_bounds_the_logits() -> None:
    spans, num_tokens, num_keys = build_spans([(False, 6, [3, 2])])
    q, k, v = random_inputs(num_tokens, num_keys, 2, 2, 8, torch.float64)
    # Logits far beyond the cap all become the cap: attention turns into a plain mean.
    out = segment_attention(q.abs() * 1e6, k.abs() + 1, v, spans, scale=1.0, softcap=2.0)
    torch.testing.assert_close(out[5], v[:6].mean(dim=0))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 2, 8), (4, 3, 8), (4, 3, 8)), "multiple of k's 3 heads"),
        (((4, 2, 8), (3, 2, 8), (3, 2, 8)), "at least 4 rows"),
        (((4, 2, 8), (4, 2, 16), (4, 2, 16)), "head size 8"),
        (((4, 2, 8), (4, 2, 8), (4, 1, 8)), "k's shape"),
        (((4, 2), (4, 2), (4, 2)), "THK"),
    ],
)
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    spans, _, _ = build_spans([(False, 2, [2])])
    with pytest.raises(ShapeError, match=message):
        segment_attention(*(torch.zeros(shape) for shape in shapes), spans, scale=1.0)


def test_mixed_dtypes_are_refused() -> None:
    spans, _, _ = build_spans([(False, 2, [2])])
    q = torch.zeros(4, 1, 8)
    with pytest.raises(ShapeError, match="share one floating dtype"):
        segment_attention(q, q.half(), q.half(), spans, scale=1.0)
