"""The prefix cache: bounded in bytes, least recently used first."""

import torch

from rankonce.model.prefix_cache import KeysValues, PrefixCache


def entry(num_bytes: int) -> KeysValues:
    half = torch.zeros(num_bytes // 2, dtype=torch.uint8)
    return [(half, half.clone())]


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = PrefixCache(max_bytes=300)
    for name in (1, 2, 3):
        cache.put((name,), entry(100))
    assert cache.get((1,)) is not None
    cache.put((4,), entry(100))
    assert cache.get((2,)) is None
    assert cache.get((1,)) is not None
    assert (cache.counts.hits, cache.counts.misses, cache.counts.evictions) == (2, 1, 1)


def test_the_bound_in_bytes_always_holds() -> None:
    cache = PrefixCache(max_bytes=1000)
    for number in range(50):
        cache.put((number,), entry(2 * (number + 1)))
        assert cache.counts.num_bytes <= 1000
    held = [cache.get((number,)) for number in range(50)]
    assert cache.counts.num_bytes == sum(t.nbytes for e in held if e for kv in e for t in kv)


def test_a_prefix_over_the_bound_is_not_kept_and_evicts_nothing() -> None:
    cache = PrefixCache(max_bytes=100)
    cache.put((1,), entry(80))
    cache.put((2,), entry(200))
    assert len(cache) == 1
    assert cache.get((1,)) is not None


def test_the_same_prefix_is_counted_once() -> None:
    cache = PrefixCache(max_bytes=1000)
    cache.put((1,), entry(100))
    cache.put((1,), entry(100))
    assert (len(cache), cache.counts.num_bytes) == (1, 100)
