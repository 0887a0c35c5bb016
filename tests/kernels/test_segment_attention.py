"""Segment attention: values and gradients of every path against a dense mask in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rankonce.errors import ShapeError
from rankonce.kernels.segment_attention import SegmentSpans, last_queries, segment_attention
from rankonce.kernels.segment_attention import triton as triton_path
from rankonce.kernels.segment_attention.cpu import segment_attention_cpu
from rankonce.kernels.segment_attention.reference import segment_attention_reference
from rankonce.kernels.segment_attention.tiles import TileKey, key_tables, query_tables
from rankonce.kernels.segment_attention.triton import TileConfig, segment_attention_triton
from rankonce.layout import PassPart, lay_out_pass
from rankonce.model.packing import spans_of
from tests.kernels.conftest import DEVICE

# Largest error by dtype, for standard normal input.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}

# A request: whether its prefix is cached, the prefix's tokens, the segments' tokens.
requests = st.tuples(
    st.booleans(),
    st.sampled_from([0, 1, 17, 63]),
    st.lists(st.sampled_from([1, 2, 5, 31, 64]), min_size=1, max_size=6),
)
long_requests = st.tuples(
    st.booleans(),
    st.sampled_from([0, 1, 63, 150, 300]),
    st.lists(st.sampled_from([1, 3, 20, 65, 140]), min_size=1, max_size=5),
)
# Heads, key/value heads, head size; 3 and 7 heads a group do not divide a tile.
shapes = st.sampled_from([(1, 1, 64), (4, 2, 32), (6, 2, 64), (7, 1, 16), (2, 1, 96), (2, 1, 128)])


def build_spans(layout: list[tuple[bool, int, list[int]]]) -> tuple[SegmentSpans, int, int]:
    parts = [
        PassPart(request=i, first=0, last=len(segments), cached=cached)
        for i, (cached, _, segments) in enumerate(layout)
    ]
    placed = lay_out_pass(parts, [r[1] for r in layout], [r[2] for r in layout])
    return spans_of(placed), placed.num_tokens, placed.num_keys


def segment_ends(layout: list[tuple[bool, int, list[int]]]) -> list[int]:
    rows, row = [], 0
    for cached, prefix, segments in layout:
        row += 0 if cached else prefix
        for length in segments:
            row += length
            rows.append(row - 1)
    return rows


def dense_mask(spans: SegmentSpans, num_keys: int, window: int | None = None) -> torch.Tensor:
    """Draw who sees whom pair by pair: independent of every path."""
    seen = torch.zeros(spans.num_queries, num_keys, dtype=torch.bool)
    for start, end, key_start, key_end, prefix_start, prefix_end in spans.rows():
        for row in range(start, end):
            own = list(range(key_start, key_end - (end - 1 - row)))
            prompt = [*range(prefix_start, prefix_end), *own]
            seen[row, prompt[-window:] if window else prompt] = True
    return seen


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("thk,shk->hts", q, k.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1)
    return torch.einsum("hts,shk->thk", weights, v.repeat_interleave(group, 1))


def random_inputs(
    num_tokens: int,
    num_keys: int,
    heads: int,
    groups: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + num_keys)
    shapes = [(num_tokens, heads, size), (num_keys, groups, size), (num_keys, groups, size)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for shape in shapes
    ]


def values_and_gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.device, out.dtype))]


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(requests, min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    size=st.sampled_from([8, 24, 64]),
    last_only=st.booleans(),
)
@pytest.mark.parametrize("path", [segment_attention_cpu, segment_attention_reference])
def test_values_and_gradients_are_those_of_a_dense_mask(
    path, layout, heads, size, last_only
) -> None:
    spans, _, num_keys = build_spans(layout)
    if last_only:
        spans = last_queries(spans, torch.tensor(segment_ends(layout)))
    inputs = random_inputs(spans.num_queries, num_keys, *heads, size, torch.float64)
    actual = values_and_gradients(path(*inputs, spans, scale=0.3), inputs)
    expected = dense_attention(*inputs, dense_mask(spans, num_keys), 0.3)
    for one, other in zip(actual, values_and_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCES[torch.float64], rtol=0)


@settings(max_examples=20, deadline=None)
@given(layout=st.lists(requests, min_size=1, max_size=3), window=st.sampled_from([1, 5, 33]))
def test_a_window_hides_what_is_further_back_in_the_same_prompt(layout, window) -> None:
    spans, _, num_keys = build_spans(layout)
    inputs = random_inputs(spans.num_queries, num_keys, 2, 1, 8, torch.float64)
    out = segment_attention(*inputs, spans, scale=0.3, window=window)
    expected = dense_attention(*inputs, dense_mask(spans, num_keys, window), 0.3)
    torch.testing.assert_close(out, expected, atol=TOLERANCES[torch.float64], rtol=0)


def check_triton(
    layout: list[tuple[bool, int, list[int]]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    softcap: float | None = None,
    window: int | None = None,
    last_only: bool = False,
    config: TileConfig | None = None,
) -> None:
    """Apply the rule of FlashAttention's tests: at most twice the error of the same dtype."""
    spans, _, num_keys = build_spans(layout)
    if last_only:
        spans = last_queries(spans, torch.tensor(segment_ends(layout)))
    inputs = random_inputs(spans.num_queries, num_keys, *shape, dtype, DEVICE)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    seen = dense_mask(spans, num_keys, window)
    options = {"scale": shape[2] ** -0.5, "softcap": softcap}
    actual = values_and_gradients(
        segment_attention_triton(*inputs, spans, window=window, **options), inputs
    )
    if config is not None:
        with torch.no_grad():
            out = segment_attention_triton(*inputs, spans, window=window, config=config, **options)
        actual = [out, *actual[1:]]
    exact = values_and_gradients(dense_attention(*exact_inputs, seen, **options), exact_inputs)
    same_dtype = values_and_gradients(dense_attention(*inputs, seen, **options), inputs)
    for name, one, other, wanted in zip(
        ("out", "dq", "dk", "dv"), actual, same_dtype, exact, strict=True
    ):
        assert one.dtype == dtype
        error = (one.double() - wanted).abs().max()
        bound = 2 * (other.double() - wanted).abs().max() + 5e-6
        assert error <= bound, f"{name}: {error:.2g} > {bound:.2g}"


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the kernels are to write with NaN, so that a row left out is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(triton_path.torch, "empty", filled(empty))
    monkeypatch.setattr(triton_path.torch, "empty_like", filled(empty_like))


# A failing example is shown as it was found: shrinking it in the interpreter takes minutes.
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layout=st.lists(long_requests, min_size=1, max_size=2),
    shape=shapes,
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    last_only=st.booleans(),
)
def test_triton_values_and_gradients_round_no_worse_than_their_dtype(
    device, nan_memory, layout, shape, dtype, last_only
) -> None:
    check_triton(layout, shape, dtype, last_only=last_only)


# A long prefix whose blocks are full, candidates shorter and longer than a tile, two requests.
MIXED = [(False, 150, [65, 3, 20]), (True, 140, [70, 1])]


@pytest.mark.parametrize("shape", [(2, 1, 64), (1, 1, 256)])
def test_triton_computes_in_fp32(device, nan_memory, shape) -> None:
    check_triton(MIXED, shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_triton_bounds_the_logits_by_softcap(device, nan_memory, dtype) -> None:
    check_triton([(False, 70, [33, 5])], (2, 1, 32), dtype, softcap=3.0)


@pytest.mark.parametrize("window", [1, 40, 140])
def test_triton_hides_what_is_outside_the_window(device, nan_memory, window) -> None:
    check_triton(MIXED, (2, 1, 32), torch.float16, window=window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", [(4, 2, 32), (2, 1, 96)])
def test_triton_loads_blocks_by_tensor_copies(device, nan_memory, shape, window) -> None:
    config = TileConfig(rows=64, keys=32, edge=32, num_warps=4, num_stages=1, copy_engine=True)
    check_triton(MIXED, shape, torch.float16, window=window, config=config)


def test_triton_takes_more_heads_a_group_than_a_tile_has_rows(device, nan_memory) -> None:
    check_triton([(False, 5, [2, 1])], (48, 1, 16), torch.float32)


def test_one_set_of_spans_serves_layers_with_and_without_a_window(device) -> None:
    spans, num_tokens, num_keys = build_spans([(False, 30, [20, 3])])
    inputs = random_inputs(num_tokens, num_keys, 2, 1, 16, torch.float32, DEVICE)
    for window in (None, 7, None):
        actual = values_and_gradients(
            segment_attention_triton(*inputs, spans, scale=0.3, window=window), inputs
        )
        wide = [x.detach().double().requires_grad_() for x in inputs]
        seen = dense_mask(spans, num_keys, window)
        expected = values_and_gradients(dense_attention(*wide, seen, 0.3), wide)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=0)


def test_a_window_matters_from_one_token_more_than_it_holds() -> None:
    spans, _, _ = build_spans([(False, 10, [5])])
    assert not spans.shortened(15)
    assert spans.shortened(14)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: torch.randn(3, 2, 24, dtype=torch.float16)[..., :20], 20),
        (lambda: torch.randn(3, 2, 32, dtype=torch.float16)[..., 4:20], 16),
        (lambda: torch.randn(3 * 2 * 24 + 4).half()[4:].view(3, 2, 24)[..., :20], 20),
        (lambda: torch.randn(3, 2, 16, dtype=torch.float16).transpose(0, 1), 16),
    ],
)
def test_rows_are_made_readable_16_bytes_at_a_time(make, size: int) -> None:
    tensor = make()
    aligned = triton_path._aligned(tensor)
    assert torch.equal(aligned, tensor)
    assert aligned.shape[2] == size
    assert aligned.data_ptr() % 16 == 0
    assert aligned.stride(2) == 1
    assert not any(stride % 8 for stride in aligned.stride()[:2])


def test_keys_that_all_rows_see_are_read_in_full_blocks() -> None:
    spans, _, _ = build_spans([(False, 200, [64, 20, 20, 150])])
    _, tiles = query_tables(spans, TileKey(queries=64, keys=32))
    by_start = {int(tile[0]): tile for tile in tiles}
    # The prefix's last tile sees 192 of its keys whole, the candidates 192 of the prefix.
    assert by_start[192][5] == 6
    assert all(by_start[start][3] == 6 for start in by_start if start >= 200)
    # The last tile of the long candidate: 62 tokens of it stand before the tile.
    last = max(by_start)
    assert by_start[last][5] == (last - 304) // 32


def test_tiles_of_score_rows_share_the_candidates_keys() -> None:
    lengths = [700] * 46
    spans, _, _ = build_spans([(False, 64, lengths)])
    score_spans = last_queries(spans, torch.tensor(segment_ends([(False, 64, lengths)])))
    _, tiles = query_tables(score_spans, TileKey(queries=64, keys=64))
    assert len(tiles) == 23
    assert tiles[:, 7:15:2].sum(axis=1).max() <= 2048


def test_triton_takes_a_thousand_candidates_of_one_token(device) -> None:
    spans, num_tokens, num_keys = build_spans([(False, 40, [1] * 1000)])
    inputs = [
        x.detach() for x in random_inputs(num_tokens, num_keys, 4, 1, 16, torch.float16, DEVICE)
    ]
    out = segment_attention_triton(*inputs, spans, scale=0.25)
    exact = segment_attention_reference(*(x.double() for x in inputs), spans, scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=0)


def test_triton_takes_a_candidate_of_two_thousand_tokens(device) -> None:
    spans, num_tokens, num_keys = build_spans([(False, 5, [2000, 3])])
    inputs = [
        x.detach() for x in random_inputs(num_tokens, num_keys, 1, 1, 16, torch.float16, DEVICE)
    ]
    out = segment_attention_triton(*inputs, spans, scale=0.25)
    exact = segment_attention_reference(*(x.double() for x in inputs), spans, scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=0)


def test_triton_reaches_elements_beyond_two_to_the_31(device) -> None:
    # Rows that are two gigabytes apart; memory that is not touched costs nothing on a CPU.
    spans, num_tokens, num_keys = build_spans([(False, 2, [1])])
    near = random_inputs(num_tokens, num_keys, 1, 1, 16, torch.float16, DEVICE)
    far = []
    for tensor in near:
        apart = torch.empty((3, 1, 2**30 + 16), dtype=torch.float16, device=DEVICE)[..., :16]
        apart.copy_(tensor.detach())
        far.append(apart.requires_grad_())
    actual = values_and_gradients(segment_attention_triton(*far, spans, scale=0.25), far)
    expected = values_and_gradients(segment_attention_triton(*near, spans, scale=0.25), near)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_triton_reads_any_layout_of_heads(device) -> None:
    spans, num_tokens, num_keys = build_spans(MIXED)
    inputs = [
        x.detach() for x in random_inputs(num_tokens, num_keys, 4, 2, 32, torch.float16, DEVICE)
    ]
    expected = segment_attention_triton(*inputs, spans, scale=0.2)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    shifted = [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in inputs]
    fused = torch.cat([x[:num_tokens].flatten(1) for x in inputs], dim=1)
    assert torch.equal(segment_attention_triton(*heads_first, spans, scale=0.2), expected)
    assert torch.equal(segment_attention_triton(*shifted, spans, scale=0.2), expected)
    q = fused[:, : 4 * 32].view(num_tokens, 4, 32)
    assert torch.equal(segment_attention_triton(q, *inputs[1:], spans, scale=0.2), expected)


def segment_outputs(
    prefix: torch.Tensor, segments: list[torch.Tensor], *, cached: bool = False
) -> list[torch.Tensor]:
    """Attend with q = k = v, which stand for the tokens themselves; return each segment's rows."""
    lengths = [len(segment) for segment in segments]
    spans, num_tokens, _ = build_spans([(cached, len(prefix), lengths)])
    rows = torch.cat([prefix, *segments])
    out = segment_attention_triton(rows[-num_tokens:], rows, rows, spans, scale=0.2)
    return list(out[-sum(lengths) :].split(lengths))


@pytest.fixture(scope="module")
def tokens() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    parts = torch.randn(491, 1, 32, generator=generator).half().to(DEVICE)
    prefix, *segments = parts.split([150, 20, 65, 3, 20, 200, 33])
    return prefix, segments


# A rounding of fp16 for values up to 4.
ROUNDING = 2**-9


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4]])
def test_triton_output_moves_at_most_one_rounding_when_candidates_are_permuted(
    device, tokens, order
) -> None:
    prefix, segments = tokens
    before = segment_outputs(prefix, segments)
    after = segment_outputs(prefix, [segments[i] for i in order])
    for place, index in enumerate(order):
        torch.testing.assert_close(after[place], before[index], atol=ROUNDING, rtol=0)


def test_triton_output_moves_at_most_one_rounding_when_candidates_come_and_go(
    device, tokens
) -> None:
    prefix, segments = tokens
    together = segment_outputs(prefix, segments)
    for index, segment in enumerate(segments):
        (alone,) = segment_outputs(prefix, [segment])
        torch.testing.assert_close(together[index], alone, atol=ROUNDING, rtol=0)


def test_triton_output_has_the_same_bits_on_a_cache_hit_and_behind_another_prefix(
    device, tokens
) -> None:
    prefix, segments = tokens
    fresh = segment_outputs(prefix, segments)
    for one, other in zip(fresh, segment_outputs(prefix, segments, cached=True), strict=True):
        assert torch.equal(one, other)


def test_triton_output_has_the_same_bits_when_other_requests_share_the_pass(device, tokens) -> None:
    prefix, segments = tokens
    alone = segment_outputs(prefix, segments)
    lengths = [len(segment) for segment in segments]
    spans, _, _ = build_spans([(False, 20, [7, 5]), (False, len(prefix), lengths)])
    other = torch.randn(32, 1, 32, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    rows = torch.cat([other, prefix, *segments])
    out = segment_attention_triton(rows, rows, rows, spans, scale=0.2)
    assert torch.equal(out[-sum(lengths) :], torch.cat(alone))


def test_a_candidate_that_fills_its_tiles_has_the_same_bits_wherever_it_stands(
    device, tokens
) -> None:
    prefix, segments = tokens
    tile = triton_path.forward_config(
        32, torch.float16, triton_path._capability(prefix.device)
    ).rows
    whole = [torch.cat([s, *segments])[:tile] for s in segments[:3]]
    before = segment_outputs(prefix, whole)
    after = segment_outputs(prefix, whole[::-1])[::-1]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_triton_reads_no_key_of_another_request(device) -> None:
    spans, num_tokens, num_keys = build_spans([(True, 9, [3, 4]), (True, 5, [2])])
    inputs = random_inputs(num_tokens, num_keys, 2, 1, 16, torch.float16, DEVICE)
    q, k, v = (x.detach() for x in inputs)
    before = segment_attention_triton(q, k, v, spans, scale=1.0)
    k[9:14], v[9:14], k[-2:], v[-2:] = torch.nan, torch.nan, torch.nan, torch.nan
    after = segment_attention_triton(q, k, v, spans, scale=1.0)
    assert torch.equal(after[:7], before[:7])
    assert torch.isnan(after[7:]).all()


def test_tiles_are_bounded_by_their_own_candidates_not_by_the_longest() -> None:
    key = TileKey(queries=64, keys=64)
    spans, _, _ = build_spans([(False, 128, [1, 1, 1000])])
    _, tiles = query_tables(spans, key)
    keys_read = tiles[:, 3] * 64 + tiles[:, 5] * 64 + tiles[:, 7:15:2].sum(axis=1)
    seen = spans.seen_ranges()
    for tile, num_keys in zip(tiles, keys_read, strict=True):
        ranges = seen[tile[0] : tile[1]]
        own = ranges[:, 3].max() - ranges[:, 2].min()
        assert num_keys == (ranges[:, 1] - ranges[:, 0]).max() + own
    assert (np.diff(keys_read) <= 0).all(), "the longest tiles come first"


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(long_requests, min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 40]),
    queries=st.sampled_from([1, 18, 64]),
    keys=st.sampled_from([16, 64]),
)
def test_tables_cover_every_pair_once(layout, window, queries, keys) -> None:
    spans, _, num_keys = build_spans(layout)
    expected = dense_mask(spans, num_keys, window).numpy()
    seen, tiles = query_tables(spans, TileKey(queries=queries, keys=keys, window=window))
    pairs = np.zeros(expected.shape, dtype=int)
    for tile in tiles:
        rows = slice(tile[0], tile[1])
        for start, blocks in (tile[2:4], tile[4:6]):
            pairs[rows, start : start + blocks * keys] += 1
        for start, length in tile[6:14].reshape(4, 2):
            for row in range(tile[0], tile[1]):
                low, high, own_low, own_high = seen[row]
                for key in range(start, start + length):
                    pairs[row, key] += low <= key < high or own_low <= key < own_high
    assert (pairs == expected).all()
    key_tiles, runs = key_tables(spans, keys=keys, num_keys=num_keys, window=window)
    pairs[:] = 0
    for key_start, key_end, first, last in key_tiles:
        for query_start, query_end, whole, _ in runs[first:last]:
            block = expected[query_start:query_end, key_start:key_end]
            # A window may leave out queries in the middle of a run.
            assert block.any(axis=1).all() or window
            assert block.all() or not whole
            pairs[query_start:query_end, key_start:key_end] += block
    assert (pairs == expected).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 8, 128), (32, 8, 64)])
def test_a_large_pass_on_the_gpu_rounds_no_worse_than_its_dtype(shape) -> None:
    check_triton(
        [(False, 2048, [64] * 20 + [7] * 31), (True, 1000, [150] * 9)], shape, torch.bfloat16
    )


@pytest.mark.gpu
def test_more_tokens_than_a_16_bit_grid_on_the_gpu() -> None:
    spans, num_tokens, num_keys = build_spans([(False, 64, [20] * 3500)])
    assert num_tokens > 65_535
    inputs = [
        x.detach() for x in random_inputs(num_tokens, num_keys, 2, 1, 64, torch.bfloat16, DEVICE)
    ]
    out = segment_attention_triton(*inputs, spans, scale=0.125)
    exact = segment_attention_reference(*(x.double() for x in inputs), spans, scale=0.125)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)


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
        (((3, 2, 8), (4, 2, 8), (4, 2, 8)), "the spans' 4 rows"),
        (((4, 2, 8), (4, 2, 16), (4, 2, 16)), "head size 8"),
        (((4, 2, 8), (4, 2, 8), (4, 1, 8)), "k's shape"),
        (((4, 2), (4, 2), (4, 2)), "THK"),
    ],
)
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    spans, _, _ = build_spans([(False, 2, [2])])
    with pytest.raises(ShapeError, match=message):
        segment_attention(*(torch.zeros(shape) for shape in shapes), spans, scale=1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 2, 0, 2, 0, 0), (3, 4, 2, 3, 0, 2)], "cover 0..T"),
        ([(0, 2, 0, 1, 0, 0)], "a key for every query"),
        ([(0, 2, 0, 2, 5, 3)], "range of key rows"),
        ([(0, 1, 0, 5, 10, 20)], "at most the span's key_start"),
    ],
)
def test_spans_that_make_no_sense_are_refused(rows, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        SegmentSpans.from_rows(rows)


def test_a_scale_that_is_not_above_0_is_refused() -> None:
    spans, _, _ = build_spans([(False, 2, [2])])
    with pytest.raises(ShapeError, match="scale: should be above 0"):
        segment_attention(*(torch.zeros(4, 1, 8) for _ in range(3)), spans, scale=0.0)


def test_mixed_dtypes_are_refused() -> None:
    spans, _, _ = build_spans([(False, 2, [2])])
    q = torch.zeros(4, 1, 8)
    with pytest.raises(ShapeError, match="share one floating dtype"):
        segment_attention(q, q.half(), q.half(), spans, scale=1.0)
