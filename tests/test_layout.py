"""Layout and planning: who stands where, and what goes into which pass."""

from hypothesis import given
from hypothesis import strategies as st

from rankonce.layout import PassPart, TokenizedRequest, lay_out_pass, plan_passes

lengths = st.integers(min_value=1, max_value=50)
tokenized = st.builds(
    lambda prefix, segments: TokenizedRequest(
        prefix_ids=tuple(range(prefix)),
        segment_ids=tuple(tuple(range(n)) for n in segments),
        label_ids=((0,), (1,)),
    ),
    st.integers(min_value=0, max_value=100),
    st.lists(lengths, min_size=1, max_size=12),
)


def test_positions_start_again_after_the_prefix_for_every_segment() -> None:
    part = PassPart(request=0, first=0, last=2, cached=False)
    layout = lay_out_pass([part], [3], [[2, 4]])
    assert layout.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert layout.score_rows_C.tolist() == [4, 8]
    assert layout.prefix_start.tolist() == [0, 0, 0]
    assert layout.prefix_end.tolist() == [0, 3, 3]
    assert layout.num_keys == layout.num_tokens == 9


def test_keys_of_cached_prefixes_stand_in_front_of_the_tokens() -> None:
    parts = [
        PassPart(request=0, first=0, last=1, cached=False),
        PassPart(request=1, first=0, last=1, cached=True),
    ]
    layout = lay_out_pass(parts, [3, 5], [[2], [2]])
    assert layout.num_keys == layout.num_tokens + 5 == 12
    assert layout.key_start.tolist() == [5, 8, 10]
    assert list(zip(layout.prefix_start, layout.prefix_end, strict=True)) == [
        (0, 0),
        (5, 8),
        (0, 5),
    ]
    assert layout.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_prefix_that_is_known_in_part_stands_whole_in_front() -> None:
    parts = [
        PassPart(request=0, first=0, last=1, cached=True),
        PassPart(request=1, first=0, last=2, cached=False, known=2),
        PassPart(request=2, first=0, last=1, cached=False),
    ]
    layout = lay_out_pass(parts, [3, 5, 2], [[1], [2, 1], [1]])
    # Known: 3 rows of request 0, 2 of request 1. Tokens: segment 0; rest of 3, segments; prefix 2.
    assert layout.num_cached == 5
    assert layout.front_rows_F.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert layout.num_keys == layout.num_tokens + 8 == 18
    assert list(zip(layout.prefix_start, layout.prefix_end, strict=True)) == [
        (0, 3), (3, 5), (3, 8), (3, 8), (0, 0), (15, 17),
    ]  # fmt: skip
    assert layout.key_start.tolist() == [8, 9, 12, 14, 15, 17]
    assert layout.positions_T.tolist() == [3, 2, 3, 4, 5, 6, 5, 0, 1, 2]


@given(
    requests=st.lists(tokenized, min_size=1, max_size=6),
    budget=st.integers(min_value=1, max_value=400),
    data=st.data(),
)
def test_a_plan_scores_every_candidate_once_and_computes_every_prefix_once(
    requests: list[TokenizedRequest], budget: int, data: st.DataObject
) -> None:
    known = [data.draw(st.integers(0, len(one.prefix_ids))) for one in requests]
    passes = plan_passes(requests, known, max_tokens_per_pass=budget)
    scored = [
        (part.request, candidate)
        for parts in passes
        for part in parts
        for candidate in range(part.first, part.last)
    ]
    assert scored == [(r, c) for r, one in enumerate(requests) for c in range(len(one.segment_ids))]
    computed = {part.request: part.known for parts in passes for part in parts if not part.cached}
    assert computed == {
        i: known[i] for i, one in enumerate(requests) if known[i] < len(one.prefix_ids)
    }
    for parts in passes:
        tokens = sum(
            sum(len(ids) for ids in requests[part.request].segment_ids[part.first : part.last])
            + len(requests[part.request].prefix_ids)
            - part.known_of(len(requests[part.request].prefix_ids))
            for part in parts
        )
        alone = len(parts) == 1 and parts[0].last - parts[0].first == 1
        assert tokens <= budget or alone


@given(requests=st.lists(tokenized, min_size=1, max_size=6))
def test_a_request_that_fits_in_a_pass_is_not_cut(requests: list[TokenizedRequest]) -> None:
    budget = max(len(one.prefix_ids) + sum(map(len, one.segment_ids)) for one in requests)
    passes = plan_passes(requests, [0] * len(requests), max_tokens_per_pass=budget)
    assert sum(map(len, passes)) == len(requests)
