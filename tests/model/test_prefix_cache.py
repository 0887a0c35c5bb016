"""The prefix cache: a tree over blocks of tokens, bounded in bytes, least recently used first."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankonce.model.prefix_cache import BLOCK_TOKENS, KeysValues, PrefixCache

BLOCK = BLOCK_TOKENS
BYTES = 8  # of one token in ``entry``: one layer, two floats
Ids = tuple[int, ...]


def entry(ids: Ids, first: int = 0) -> KeysValues:
    """Keys that say which tokens stand before, as real ones do, and values that say which layer."""
    sums = torch.tensor(ids, dtype=torch.float32).cumsum(0)[first:, None, None]
    return [(sums, -sums)]


def put(cache: PrefixCache, ids: Ids, **options: object) -> None:
    cache.put(ids, entry(ids), **options)  # type: ignore[arg-type]


def known_of(cache: PrefixCache, ids: Ids, **options: object) -> int:
    found = cache.get(ids, **options)  # type: ignore[arg-type]
    if found is None:
        return 0
    count = len(found[0][0])
    for kept, right in zip(found[0], entry(ids)[0], strict=True):
        assert torch.equal(kept, right[:count])
    return count


def run(first: int, count: int) -> Ids:
    return tuple(range(first, first + count))


def test_prefixes_share_the_blocks_that_they_begin_with() -> None:
    cache = PrefixCache(100_000)
    shared = run(0, 3 * BLOCK)
    one, other = shared + run(500, 2 * BLOCK + 5), shared + run(900, 7)
    put(cache, one)
    assert known_of(cache, other) == 3 * BLOCK
    cache.put(other, entry(other, 3 * BLOCK), known=3 * BLOCK)
    assert (known_of(cache, one), known_of(cache, other)) == (len(one), len(other))
    assert cache.counts.num_bytes == BYTES * (5 * BLOCK + 5 + 7)


def test_a_prefix_that_goes_on_is_known_up_to_its_last_whole_block() -> None:
    cache = PrefixCache(100_000)
    put(cache, run(0, 2 * BLOCK + 3))
    assert known_of(cache, run(0, 5 * BLOCK)) == 2 * BLOCK
    assert known_of(cache, run(0, BLOCK + 7)) == BLOCK
    assert known_of(cache, run(1, 5 * BLOCK)) == 0


def test_adapters_and_salts_never_share() -> None:
    cache = PrefixCache(100_000)
    ids = run(0, 40)
    put(cache, ids, adapter="films", cache_salt="a")
    for adapter, salt in ((None, None), ("films", None), (None, "a"), ("films", "b")):
        assert known_of(cache, ids, adapter=adapter, cache_salt=salt) == 0
    assert known_of(cache, ids, adapter="films", cache_salt="a") == 40


def test_an_adapter_that_changed_is_forgotten() -> None:
    cache = PrefixCache(100_000)
    for adapter in ("films", "jobs", None):
        put(cache, run(0, 40), adapter=adapter)
        put(cache, run(7, 40), adapter=adapter, cache_salt="a")
    cache.drop("films")
    assert known_of(cache, run(0, 40), adapter="films") == 0
    assert known_of(cache, run(7, 40), adapter="films", cache_salt="a") == 0
    assert known_of(cache, run(0, 40), adapter="jobs") == 40
    assert cache.counts.num_bytes == 4 * 40 * BYTES


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = PrefixCache(3 * 5 * BYTES)
    for first in (100, 200, 300):
        put(cache, run(first, 5))
    assert known_of(cache, run(100, 5))
    put(cache, run(400, 5))
    assert not known_of(cache, run(200, 5))
    assert known_of(cache, run(100, 5))
    assert (cache.counts.hits, cache.counts.misses, cache.counts.evictions) == (2, 1, 1)
    assert (cache.counts.hit_tokens, cache.counts.asked_tokens) == (10, 15)


def test_what_others_begin_with_outlives_them() -> None:
    cache = PrefixCache(BYTES * 3 * BLOCK)
    shared = run(0, BLOCK)
    for first in (100, 200, 300, 400):
        put(cache, shared + run(first, BLOCK))
    assert known_of(cache, shared + run(100, BLOCK)) == BLOCK
    assert known_of(cache, shared + run(400, BLOCK)) == 2 * BLOCK


def test_pinned_tokens_go_last() -> None:
    cache = PrefixCache(BYTES * 4 * BLOCK)
    instruction = run(0, BLOCK + 3)
    cache.pin(instruction)
    put(cache, instruction + run(100, BLOCK))
    for first in range(1000, 2000, 100):
        put(cache, run(first, 2 * BLOCK))
    assert known_of(cache, instruction) == BLOCK
    assert cache.counts.num_bytes <= cache.max_bytes


def test_pinned_tokens_do_not_break_the_bound() -> None:
    cache = PrefixCache(BYTES * 4 * BLOCK)
    for first in range(1000, 2000, 100):
        cache.pin(run(first, 2 * BLOCK))
        put(cache, run(first, 2 * BLOCK))
        assert cache.counts.num_bytes <= cache.max_bytes
    assert known_of(cache, run(1900, 2 * BLOCK)) == 2 * BLOCK


def test_a_prefix_over_the_bound_is_not_kept_and_evicts_nothing() -> None:
    cache = PrefixCache(BYTES * 10)
    put(cache, run(0, 8))
    put(cache, run(100, 20))
    assert len(cache) == 1
    assert known_of(cache, run(0, 8)) == 8


def test_the_rest_of_a_prefix_whose_beginning_has_gone_is_not_kept() -> None:
    cache = PrefixCache(100_000)
    ids = run(0, 3 * BLOCK)
    cache.put(ids, entry(ids, BLOCK), known=BLOCK)
    assert (len(cache), cache.counts.num_bytes) == (0, 0)


words = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(
    lambda blocks: tuple(token for block in blocks for token in run(block * 100, BLOCK))
)
prefixes = st.builds(lambda ids, cut: ids[: max(1, len(ids) - cut)], words, st.integers(0, BLOCK))


@settings(max_examples=150)
@given(st.lists(st.tuples(prefixes, st.sampled_from([None, "a"])), min_size=1, max_size=30))
def test_whatever_is_put_the_bound_holds_and_what_is_found_is_right(
    asked: list[tuple[Ids, str | None]],
) -> None:
    # Both trees may pin two blocks beside the longest prefix.
    cache = PrefixCache(BYTES * 10 * BLOCK)
    cache.pin(run(100, BLOCK) + run(0, BLOCK))
    for ids, salt in asked:
        known = known_of(cache, ids, cache_salt=salt)
        assert known == len(ids) or known % BLOCK == 0
        if known < len(ids):
            cache.put(ids, entry(ids, known), cache_salt=salt, known=known)
            assert known_of(cache, ids, cache_salt=salt) == len(ids)
        assert cache.counts.num_bytes <= cache.max_bytes
    held = [*cache._order, *cache._pinned_order]
    assert cache.counts.num_bytes == sum(node.num_bytes for node in held)
