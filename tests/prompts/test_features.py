"""Numbers from the past against slow counts, and the proof that none sees the future."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankonce.errors import DataError
from rankonce.prompts.features import (
    MONTH,
    WEEK,
    PastEvents,
    Questions,
    co_liked_neighbours,
    count_before,
    expected_share,
    genre_affinity,
    genre_rates,
    history_share,
    item_rates,
    member_rates,
    overall_share,
    popularity_percentile,
    recency,
    smoothed_share,
    standing_percentile,
)

GENRES = {0: ["Drama"], 1: ["Drama", "Crime"], 2: [], 3: ["Crime", "Comedy"]}
# Few members, items and moments, so that many meet in one second.
EVENT = st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5), st.integers(0, 1))
EVENTS = st.lists(EVENT, min_size=1, max_size=20)


def ints(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def histories_of(events: list[tuple[int, ...]]) -> list[list[int]]:
    """What each event's member had liked strictly before it."""
    return [
        [item for member, item, moment, like in sorted(events, key=lambda e: e[2]) if like
         and member == one[0] and moment < one[2]]
        for one in events
    ]  # fmt: skip


def build_past(events: list[tuple[int, ...]]) -> PastEvents:
    members, items, moments, likes = zip(*events, strict=True)
    return PastEvents(
        members=ints(members),
        items=ints(items),
        moments=ints(moments),
        likes=ints(likes),
        histories=histories_of(events),
    )


def build_questions(events: list[tuple[int, ...]]) -> Questions:
    past = build_past(events)
    return Questions(
        members=past.members, items=past.items, moments=past.moments, histories=past.histories
    )


def expected_of(past: PastEvents, asked: Questions) -> np.ndarray:
    return expected_share(
        item_rates(past, asked),
        member_rates(past, asked),
        overall=overall_share(past, asked),
        item_strength=5.0,
        member_strength=10.0,
    )


def affinity_of(past: PastEvents, asked: Questions) -> np.ndarray:
    genre = genre_rates(past, asked, genres_by_item=GENRES)
    overall = overall_share(past, asked)
    return genre_affinity(genre, member_rates(past, asked), overall=overall, strength=10.0)


def neighbours_of(name: str) -> Callable[[PastEvents, Questions], np.ndarray]:
    return lambda past, asked: getattr(co_liked_neighbours(past, asked), name)


FEATURES: dict[str, Callable[[PastEvents, Questions], np.ndarray]] = {
    "item counts": lambda past, asked: item_rates(past, asked).counts,
    "item likes": lambda past, asked: item_rates(past, asked).likes,
    "member counts": lambda past, asked: member_rates(past, asked).counts,
    "member likes": lambda past, asked: member_rates(past, asked).likes,
    "overall share": overall_share,
    "expected share": expected_of,
    "popularity": lambda past, asked: popularity_percentile(past, asked, period_s=2),
    "standing": lambda past, asked: standing_percentile(past, asked, num_items=5, period_s=2),
    "recency": recency,
    "genre affinity": affinity_of,
    "neighbours who met it": neighbours_of("counts"),
    "neighbours who liked it": neighbours_of("likes"),
    "co-likes": neighbours_of("co_likes"),
    "mean co-like": neighbours_of("mean_cosine"),
    "closest co-like": neighbours_of("max_cosine"),
    "history share": history_share,
    "newest history share": lambda past, asked: history_share(past, asked, newest=1),
}


@pytest.mark.parametrize("name", FEATURES)
@given(events=EVENTS, others=EVENTS, moment=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_nothing_of_the_same_second_or_later_reaches_a_number(
    name: str, events: list[tuple[int, ...]], others: list[tuple[int, ...]], moment: int
) -> None:
    early = [one for one in events if one[2] <= moment]
    if not early:
        return
    asked = build_questions(early)
    before = FEATURES[name](build_past(events), asked)
    # From the moment on likes are the opposite, and foreign events take the place of later ones.
    changed = [
        (m, i, t, 1 - like if t >= moment else like) for m, i, t, like in events if t <= moment
    ] + [(m, i, t + moment, like) for m, i, t, like in others]
    after = FEATURES[name](build_past(changed), asked)
    np.testing.assert_array_equal(after, before)


def slow_number(name: str, events: list[tuple[int, ...]], one: tuple[int, ...]) -> float:
    """Count what one question may know, event by event."""
    member, item, moment, _ = one
    past = [e for e in events if e[2] < moment]
    own = [e for e in past if e[0] == member]
    of_item = [e for e in past if e[1] == item]
    mine = sorted(set(histories_of([*events, one])[-1]), key=str)
    history = histories_of([*events, one])[-1]
    overall = (sum(e[3] for e in past) + 1) / (len(past) + 2)

    def had_liked(event: tuple[int, ...], film: int) -> int:
        return sum(
            e[0] == event[0] and e[1] == film and e[3] == 1 and e[2] < event[2] for e in events
        )

    def cosine(film: int) -> float:
        both = sum(had_liked(e, film) for e in past if e[1] == item and e[3])
        both += sum(had_liked(e, item) for e in past if e[1] == film and e[3])
        likes = sum(e[3] for e in past if e[1] == film)
        return both / ((likes + 1) * (sum(e[3] for e in of_item) + 1)) ** 0.5

    def share_of(film: int) -> float:
        rows = [e for e in past if e[1] == film]
        return (sum(e[3] for e in rows) + 5 * overall) / (len(rows) + 5)

    match name:
        case "item counts":
            return len(of_item)
        case "item likes":
            return sum(e[3] for e in of_item)
        case "member counts":
            return len(own)
        case "member likes":
            return sum(e[3] for e in own)
        case "overall share":
            return overall
        case "standing":
            until = [e[1] for e in events if e[2] < moment // 2 * 2]
            above = sum(until.count(other) < until.count(item) for other in range(5))
            return 20.0 * above if until else np.nan
        case "recency":
            return moment - max(e[2] for e in of_item) if of_item else np.nan
        case "neighbours who met it":
            return sum(had_liked(e, film) for e in of_item for film in history)
        case "neighbours who liked it":
            return sum(had_liked(e, film) for e in of_item if e[3] for film in history)
        case "mean co-like":
            return float(np.mean([cosine(film) for film in history])) if history else 0.0
        case "closest co-like":
            return max((cosine(film) for film in mine), default=0.0)
        case "history share":
            return float(np.mean([share_of(film) for film in history])) if history else np.nan
        case "newest history share":
            return share_of(history[-1]) if history else np.nan
    raise KeyError(name)


SLOW = [
    name for name in FEATURES
    if name not in ("expected share", "popularity", "genre affinity", "co-likes")
]  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
@given(events=EVENTS)
@settings(deadline=None, max_examples=40)
def test_a_number_equals_a_slow_count(name: str, events: list[tuple[int, ...]]) -> None:
    found = FEATURES[name](build_past(events), build_questions(events))
    expected = [slow_number(name, events, one) for one in events]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1, -3, 2**58 + 1])
def test_ids_of_any_size_count_the_same(scale: int) -> None:
    random = np.random.default_rng(0)
    events = [tuple(map(int, one)) for one in random.integers([4, 5, 9, 2], size=(63, 4))]
    named = [(member * scale, item * scale, *rest) for member, item, *rest in events]
    for name in SLOW:
        found = FEATURES[name](build_past(named), build_questions(named))
        expected = [slow_number(name, events, one) for one in events]
        np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)


@given(events=EVENTS, asked=EVENTS)
@settings(deadline=None, max_examples=100)
def test_a_count_is_of_the_events_before_it(
    events: list[tuple[int, ...]], asked: list[tuple[int, ...]]
) -> None:
    _, keys, moments, likes = (ints(column) for column in zip(*events, strict=True))
    _, query_keys, query_moments, _ = (ints(column) for column in zip(*asked, strict=True))
    # Keys of the queries that no event has, lower and higher ones among them.
    found = count_before(keys, moments, likes, 2 * query_keys - 3, query_moments)
    for place, (_, key, moment, _) in enumerate(asked):
        before = [e for e in events if e[1] == 2 * key - 3 and e[2] < moment]
        assert (found[0][place], found[1][place]) == (len(before), sum(e[3] for e in before))


def test_popularity_is_the_percentile_in_the_last_period_in_which_anything_happened() -> None:
    day = 86_400
    events = [(0, 1, day, 1), (1, 1, 2 * day, 0), (2, 2, 3 * day, 1), (0, 3, 40 * day, 1)]
    past = build_past(events)
    asked = [(9, item, 32 * day, 0) for item in (1, 2, 3)] + [(9, 3, 29 * day, 0)]
    found = popularity_percentile(past, build_questions(asked), period_s=MONTH)
    # Of the two films of the first month one is above the other; the third had no event in it.
    np.testing.assert_array_equal(found, [50.0, 0.0, 0.0, np.nan])
    later = [(9, 3, 200 * day, 0), (9, 1, 200 * day, 0)]
    np.testing.assert_array_equal(
        popularity_percentile(past, build_questions(later), period_s=MONTH), [0.0, 0.0]
    )
    week = popularity_percentile(past, build_questions([(9, 1, 8 * day, 0)]), period_s=WEEK)
    np.testing.assert_array_equal(week, [50.0])


def test_expectations_add_what_item_and_member_deviate() -> None:
    # The item is liked twice as often as not, the member likes everything.
    events = [(1, 1, 0, 1), (2, 1, 0, 1), (3, 1, 0, 0), (9, 2, 0, 1), (9, 3, 0, 1)]
    (found,) = expected_of(build_past(events), build_questions([(9, 1, 5, 0)]))
    overall, item, member = 5 / 7, (2 + 25 / 7) / 8, (2 + 50 / 7) / 12

    def odds(share: float) -> float:
        return float(np.log(share / (1 - share)))

    expected = odds(item) + odds(member) - odds(overall)
    assert odds(found) == pytest.approx(expected)


def test_affinity_is_higher_for_genres_that_the_member_likes_more_than_others() -> None:
    events = [(1, 0, t, 1) for t in range(4)] + [(1, 3, t, 0) for t in range(4)]
    asked = build_questions([(1, 0, 9, 0), (1, 3, 9, 0), (1, 2, 9, 0), (7, 0, 9, 0)])
    found = affinity_of(build_past(events), asked)
    # 4 of 4 dramas, 0 of 4 others, shrunk by ten events towards the half that the member likes.
    assert found == pytest.approx([9 / 14, 5 / 14, 0.5, 0.5])


@pytest.mark.parametrize("feature", [co_liked_neighbours, history_share])
def test_missing_histories_are_named(feature: Callable[..., Any]) -> None:
    past = build_past([(1, 1, 1, 1)])
    asked = Questions(members=past.members, items=past.items, moments=past.moments)
    with pytest.raises(DataError, match="histories"):
        feature(past, asked)


def test_impossible_settings_are_refused() -> None:
    past, asked = build_past([(1, 1, 1, 1)]), build_questions([(1, 1, 1, 1)])
    with pytest.raises(DataError, match="period_s"):
        popularity_percentile(past, asked, period_s=0)
    with pytest.raises(DataError, match="period_s"):
        standing_percentile(past, asked, num_items=1, period_s=0)
    with pytest.raises(DataError, match="strength: should be above 0"):
        smoothed_share(ints([0]), ints([0]), prior=0.5, strength=0)
