"""Buckets fill with time, and no owner pays for another."""

import pytest

from rankonce.serving.keys import ApiKey
from rankonce.serving.limits import Grant, RateLimits, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "search", **limits: int) -> ApiKey:
    return ApiKey(name=name, digest=name.encode(), **limits)  # type: ignore[arg-type]


def test_a_bucket_refills_steadily_and_holds_a_minutes_worth() -> None:
    clock = Clock()
    bucket = TokenBucket(30, clock=clock)
    bucket.take(30)
    assert bucket.balance == 0
    assert bucket.seconds_until(1) == 2
    clock.now += 5
    assert bucket.balance == pytest.approx(2.5)
    clock.now += 3600
    assert bucket.balance == 30
    bucket.take(45)
    assert bucket.balance == -15
    assert bucket.seconds_until(1) == 32


def test_requests_beyond_the_rate_are_told_when_to_come_back() -> None:
    clock = Clock()
    limits = RateLimits(requests_per_minute=3, clock=clock)
    assert [type(limits.admit(key(), num_bytes=0)) for _ in range(3)] == [Grant] * 3
    assert limits.admit(key(), num_bytes=0) == pytest.approx(20)
    clock.now += 20
    assert isinstance(limits.admit(key(), num_bytes=0), Grant)
    assert limits.admit(key(), num_bytes=0) == pytest.approx(20)


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limits = RateLimits(requests_per_minute=1, clock=clock)
    limits.admit(key(), num_bytes=0)
    for _ in range(50):
        assert isinstance(limits.admit(key(), num_bytes=400), float)
    clock.now += 60
    assert isinstance(limits.admit(key(), num_bytes=0), Grant)


def test_owners_do_not_share_their_limits_and_a_key_may_have_its_own() -> None:
    limits = RateLimits(requests_per_minute=1, clock=Clock())
    assert isinstance(limits.admit(key("a"), num_bytes=0), Grant)
    assert isinstance(limits.admit(key("b"), num_bytes=0), Grant)
    assert limits.admit(key("a"), num_bytes=0) == 60
    large = [limits.admit(key("c", requests_per_minute=120), num_bytes=0) for _ in range(121)]
    assert large[-1] == pytest.approx(0.5)
    assert all(isinstance(one, Grant) for one in large[:-1])


def test_tokens_are_charged_when_they_are_known() -> None:
    clock = Clock()
    limits = RateLimits(tokens_per_minute=600, clock=clock)
    grant = limits.admit(key(), num_bytes=40)
    assert grant == Grant(owner="search", reserved=10)
    limits.settle(grant, 900)
    # 300 are owed and one is needed, at 10 a second.
    assert limits.admit(key(), num_bytes=40) == pytest.approx(30.1)
    clock.now += 30.2
    assert isinstance(limits.admit(key(), num_bytes=40), Grant)


def test_questions_at_the_same_time_cannot_all_pass_on_one_balance() -> None:
    limits = RateLimits(tokens_per_minute=1000, clock=Clock())
    grants = [limits.admit(key(), num_bytes=1600) for _ in range(4)]
    assert [isinstance(one, Grant) for one in grants] == [True, True, True, False]
    # Two of them turn out to be bad questions and cost nothing.
    for grant in grants[:2]:
        assert isinstance(grant, Grant)
        limits.settle(grant, 0)
    assert isinstance(limits.admit(key(), num_bytes=1600), Grant)


def test_without_limits_nothing_is_refused() -> None:
    limits = RateLimits(clock=Clock())
    grants = [limits.admit(key(), num_bytes=10**9) for _ in range(1000)]
    assert grants == [Grant(owner="search", reserved=0)] * 1000
