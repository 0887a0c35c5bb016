"""The block mask that is worked out from spans is that of the dense mask, on any layout."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from rankonce.benchmarks.block_mask import block_kinds, block_mask_of, dense_mask_of
from rankonce.layout import PassPart, SegmentLayout, lay_out_pass


@st.composite
def layouts(draw: st.DrawFn) -> SegmentLayout:
    parts, prefixes, lengths = [], [], []
    for request in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 4))
        lengths.append(draw(st.lists(st.integers(1, 13), min_size=count, max_size=count)))
        prefixes.append(draw(st.integers(0, 21)))
        cached = draw(st.booleans())
        parts.append(PassPart(request=request, first=0, last=count, cached=cached))
    return lay_out_pass(parts, prefixes, lengths)


def by_definition(layout: SegmentLayout) -> Tensor:
    seen = torch.zeros(layout.num_tokens, layout.num_keys, dtype=torch.bool)
    for span in range(len(layout.query_start)):
        start, end = layout.query_start[span], layout.query_end[span]
        seen[start:end, layout.prefix_start[span] : layout.prefix_end[span]] = True
        for token in range(start, end):
            own = layout.key_start[span]
            seen[token, own : own + token - start + 1] = True
    return seen


@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from([1, 4, 8, 16]))
def test_blocks_worked_out_from_spans_are_those_of_the_dense_mask(
    layout: SegmentLayout, block: int
) -> None:
    dense = by_definition(layout)
    assert torch.equal(dense_mask_of(layout, "cpu"), dense)
    rows, columns = -(-layout.num_tokens // block), -(-layout.num_keys // block)
    padded = torch.zeros(rows * block, columns * block, dtype=torch.bool)
    padded[: layout.num_tokens, : layout.num_keys] = dense
    blocks = padded.view(rows, block, columns, block)
    some, every = block_kinds(layout, block)
    np.testing.assert_array_equal(some, blocks.any(dim=3).any(dim=1).numpy())
    np.testing.assert_array_equal(every, blocks.all(dim=3).all(dim=1).numpy())


@settings(deadline=None, max_examples=15)
@given(layouts())
def test_flex_attention_takes_it_for_the_mask_that_it_would_have_made(
    layout: SegmentLayout,
) -> None:
    mask = block_mask_of(layout, "cpu", block=16)
    made = create_block_mask(
        mask.mask_mod, None, None, layout.num_tokens, layout.num_keys, device="cpu", BLOCK_SIZE=16
    )
    assert mask.seq_lengths == made.seq_lengths
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(made, name)), name
    for name in ("kv_indices", "full_kv_indices"):
        counts = getattr(mask, name.replace("indices", "num_blocks"))[0, 0].tolist()
        for row, count in enumerate(counts):
            ours, theirs = (getattr(one, name)[0, 0, row, :count] for one in (mask, made))
            assert torch.equal(ours, theirs), name
    queries, keys = torch.arange(layout.num_tokens)[:, None], torch.arange(layout.num_keys)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, queries, keys), by_definition(layout))
