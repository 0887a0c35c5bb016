"""What a prompt says of members and items in numbers, each computed only from the past.

Every function takes the events that are known and R questions, a member and an item at a moment,
and looks at strictly earlier events only ("prequential": A. P. Dawid, 1984): neither the answer to
a question nor anything of the same second can reach it. Histories that questions bring are taken as
they are given. ``prompts.spelling`` makes words of the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rankonce.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

WEEK, MONTH, YEAR = 7 * 86_400, 30 * 86_400, 31_556_952


@dataclass(frozen=True, kw_only=True)
class PastEvents:
    """N events that are known, in any order.

    Attributes:
        members, items: any whole numbers.
        moments: in Unix seconds.
        likes: 1 where the member liked the item, else 0.
        histories: for each event what the member had liked before it, where that is known.
    """

    members: Ints
    items: Ints
    moments: Ints
    likes: Ints
    histories: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """R members and items at a moment.

    Attributes:
        histories: for each question what the member had liked before it.
    """

    members: Ints
    items: Ints
    moments: Ints
    histories: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often something happened and how often it was liked, R numbers each."""

    counts: Floats
    likes: Floats

    def share(self, *, prior: float | Floats, strength: float) -> Floats:
        """Shrink the share of likes towards a prior that is worth ``strength`` events."""
        return smoothed_share(self.likes, self.counts, prior=prior, strength=strength)


def item_rates(past: PastEvents, asked: Questions) -> Rates:
    """Count the events of each question's item, and its likes."""
    return _rates(past.items, past, asked.items, asked)


def member_rates(past: PastEvents, asked: Questions) -> Rates:
    """Count the events of each question's member, and the likes."""
    return _rates(past.members, past, asked.members, asked)


def overall_share(past: PastEvents, asked: Questions) -> Floats:
    """Share of likes among all events before each question, (likes + 1) / (events + 2)."""
    rates = _rates(np.zeros_like(past.items), past, np.zeros_like(asked.items), asked)
    return rates.share(prior=0.5, strength=2.0)


def expected_share(
    item: Rates, member: Rates, *, overall: Floats, item_strength: float, member_strength: float
) -> Floats:
    """What the averages of item and member together lead one to expect.

    Log-odds = item + member - all: both deviations from the mean count in full.
    """
    total = log_odds(item.share(prior=overall, strength=item_strength))
    total = total + log_odds(member.share(prior=overall, strength=member_strength))
    share: Floats = 1 / (1 + np.exp(log_odds(overall) - total))
    return share


def popularity_percentile(past: PastEvents, asked: Questions, *, period_s: int) -> Floats:
    """Percentile (0..100) of each item's events in a whole period before the question.

    Periods follow one another from the epoch on. A question looks at the last one that ended before
    its own began and in which anything happened; items with an event in it are ranked, one without
    has percentile 0 (PrepRec: Wang et al. 2024, by month and by week). nan before the first period.

    Args:
        period_s: length of a period, ``MONTH`` or ``WEEK``.

    Raises:
        DataError: the period is not above 0.
    """
    if period_s <= 0:
        raise DataError(f"period_s: should be above 0, is {period_s}")
    periods = past.moments // period_s
    known = np.unique(periods)
    places = np.searchsorted(known, asked.moments // period_s) - 1
    percentiles = np.full(len(places), np.nan)
    for place in np.unique(places[places >= 0]):
        items, counts = np.unique(past.items[periods == known[place]], return_counts=True)
        of = places == place
        found = np.minimum(np.searchsorted(items, asked.items[of]), len(items) - 1)
        own = np.where(items[found] == asked.items[of], counts[found], 0)
        below = np.searchsorted(np.sort(counts), own)
        percentiles[of] = 100.0 * below / len(items)
    return percentiles


def standing_percentile(
    past: PastEvents, asked: Questions, *, num_items: int, period_s: int
) -> Floats:
    """Percentile (0..100) of each item's events among all items until its period began.

    Unlike ``popularity_percentile`` everything until then counts, and items without an event are
    ranked too. nan where nothing had happened.

    Args:
        num_items: all that could have an event.
        period_s: length of a period, such as ``YEAR``; they follow one another from the epoch on.

    Raises:
        DataError: the period is not above 0.
    """
    if period_s <= 0:
        raise DataError(f"period_s: should be above 0, is {period_s}")
    begun = asked.moments // period_s * period_s
    own, _ = count_before(past.items, past.moments, past.likes, asked.items, begun)
    percentiles = np.full(len(begun), np.nan)
    for moment in np.unique(begun):
        _, counts = np.unique(past.items[past.moments < moment], return_counts=True)
        if len(counts):
            of = begun == moment
            below = np.searchsorted(np.sort(counts), own[of])
            below += np.where(own[of] > 0, num_items - len(counts), 0)
            percentiles[of] = 100.0 * below / num_items
    return percentiles


def recency(past: PastEvents, asked: Questions) -> Floats:
    """Seconds since the item's last event, nan where there was none."""
    counts, _ = count_before(past.items, past.moments, past.likes, asked.items, asked.moments)
    order = np.lexsort((past.moments, past.items))
    items, moments = past.items[order], past.moments[order]
    # An item's events stand together in the order of time: the last one before the question is
    # as many places behind the first as there are earlier ones.
    last = np.searchsorted(items, asked.items) + counts - 1
    known = counts > 0
    since = np.full(len(asked.items), np.nan)
    since[known] = asked.moments[known] - moments[last[known]]
    return since


def genre_rates(
    past: PastEvents, asked: Questions, *, genres_by_item: Mapping[int, Sequence[str]]
) -> Rates:
    """Count the member's events with a genre of the item, mean over its genres.

    nan where the item has no known genre.
    """
    codes = {
        g: code for code, g in enumerate(sorted({g for v in genres_by_item.values() for g in v}))
    }
    parents, genres = _explode_genres(past.items, genres_by_item, codes)
    asked_parents, asked_genres = _explode_genres(asked.items, genres_by_item, codes)
    # Small numbers for the members: any 64-bit id times the genres must not overflow.
    _, members = np.unique(np.concatenate([past.members, asked.members]), return_inverse=True)
    members = members.astype(np.int64) * len(codes)
    counts = count_before(
        members[: len(past.members)][parents] + genres,
        past.moments[parents],
        past.likes[parents],
        members[len(past.members) :][asked_parents] + asked_genres,
        asked.moments[asked_parents],
    )
    mean = [_mean_by_row(asked_parents, c, len(asked.items)) for c in counts]
    return Rates(counts=mean[0], likes=mean[1])


def genre_affinity(genre: Rates, member: Rates, *, overall: Floats, strength: float) -> Floats:
    """The member's like share of the item's genres, shrunk towards that of everything.

    Args:
        genre, member: the member's rates with the item's genres and with all items.
        strength: events that a prior is worth: the overall share in the member's, and the
            member's in that of the genres.

    Returns:
        Shares in 0..1; the member's own where nothing is known of the genres.
    """
    usual = member.share(prior=overall, strength=strength)
    counts, likes = (np.nan_to_num(values) for values in (genre.counts, genre.likes))
    return smoothed_share(likes, counts, prior=usual, strength=strength)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """What members who liked the same as the one who asks did with the item, R numbers each.

    Attributes:
        counts: events of the item by members who had liked a film of the history before.
        likes: the liked ones among these.
        co_likes: members who liked the item and a film of the history, in either order.
        mean_cosine, max_cosine: co-likes of the item and a film of the history against the
            popularity of both, over the history; 0 without a history.
    """

    counts: Floats
    likes: Floats
    co_likes: Floats
    mean_cosine: Floats
    max_cosine: Floats


def co_liked_neighbours(past: PastEvents, asked: Questions) -> Neighbours:
    """Compare each item with what the member had liked, by who else liked both.

    A co-like counts when both likes lie before the question.

    Raises:
        DataError: histories are missing.
    """
    if past.histories is None or asked.histories is None:
        raise DataError("histories: should be given for the events and for the questions")
    num = len(asked.items)
    rows, liked = _explode(asked.histories)
    known_rows, known_liked = _explode(past.histories)
    known = np.unique(np.concatenate([past.items, asked.items, liked, known_liked]))
    past_codes, asked_codes, liked_codes, known_codes = (
        np.searchsorted(known, items) for items in (past.items, asked.items, liked, known_liked)
    )
    width = len(known)
    queries = liked_codes * width + asked_codes[rows]
    moments = asked.moments[rows]
    known_moments, labels = past.moments[known_rows], past.likes[known_rows]
    forward, is_like = known_codes * width + past_codes[known_rows], labels == 1
    reverse = (past_codes[known_rows] * width + known_codes)[is_like]
    rated, likes, reverse_likes = _count_marks(
        np.concatenate([forward, reverse]),
        np.concatenate([known_moments, known_moments[is_like]]),
        # Who liked the film of the history later says nothing of how the item is liked.
        np.concatenate([1 + 2 * labels, np.full(len(reverse), 4)]),
        queries,
        moments,
        num_bits=3,
    )
    co_likes = likes + reverse_likes
    _, of_item = count_before(past_codes, past.moments, past.likes, asked_codes, asked.moments)
    _, of_liked = count_before(past_codes, past.moments, past.likes, liked_codes, moments)
    cosine = co_likes / np.sqrt((of_liked + 1.0) * (of_item[rows] + 1.0))
    largest = np.zeros(num)
    np.maximum.at(largest, rows, cosine)
    return Neighbours(
        counts=_sum_by_row(rows, rated, num),
        likes=_sum_by_row(rows, likes, num),
        co_likes=_sum_by_row(rows, co_likes, num),
        mean_cosine=np.nan_to_num(_mean_by_row(rows, cosine, num)),
        max_cosine=largest,
    )


def history_share(
    past: PastEvents, asked: Questions, *, newest: int | None = None, strength: float = 5.0
) -> Floats:
    """How well others like what the member had liked: mean like share, nan without a history.

    Args:
        newest: look at so many of the newest films of the history only.
        strength: events that the overall share is worth in each film's share.

    Raises:
        DataError: histories are missing.
    """
    if asked.histories is None:
        raise DataError("histories: should be given for the questions")
    histories = asked.histories if newest is None else [h[-newest:] for h in asked.histories]
    rows, liked = _explode(histories)
    moments = asked.moments[rows]
    counts = count_before(past.items, past.moments, past.likes, liked, moments)
    shares = smoothed_share(
        counts[1], counts[0], prior=overall_share(past, asked)[rows], strength=strength
    )
    return _mean_by_row(rows, shares, len(asked.items))


def smoothed_share(
    likes: Ints | Floats, count: Ints | Floats, *, prior: float | Floats, strength: float
) -> Floats:
    """Shrink a like share towards a prior: (likes + strength * prior) / (count + strength).

    Args:
        likes, count: arrays of one shape, likes ≤ count.
        prior: the share before any row, one number or one a row.
        strength: how many rows the prior is worth; above 0, else an empty count has no share.

    Raises:
        DataError: the strength is not above 0.
    """
    if not strength > 0:
        raise DataError(f"strength: should be above 0, not {strength}")
    prior_likes = strength * np.asarray(prior, dtype=np.float64)
    share: Floats = (likes.astype(np.float64) + prior_likes) / (count.astype(np.float64) + strength)
    return share


def log_odds(share: Floats) -> Floats:
    """Turn shares in (0, 1) into log(share / (1 - share))."""
    odds: Floats = np.log(share) - np.log1p(-share)
    return odds


def count_before(
    keys: Ints, moments: Ints, likes: Ints, query_keys: Ints, query_moments: Ints
) -> tuple[Ints, Ints]:
    """Count for every query the events of its key at strictly earlier moments.

    Args:
        keys, moments, likes: key, time and 0 or 1 of each event, in any order.
        query_keys, query_moments: key and time of each query.

    Returns:
        The events of each query and the sum of their likes.
    """
    counts = _count_marks(keys, moments, 1 + 2 * likes, query_keys, query_moments, num_bits=2)
    return counts[0], counts[1]


def _count_marks(
    keys: Ints,
    moments: Ints,
    marks: Ints,
    query_keys: Ints,
    query_moments: Ints,
    *,
    num_bits: int,
) -> list[Ints]:
    """Count for every query the events before it of its key that bear a mark, mark by mark.

    Args:
        marks: of each event, a bit a mark.

    Returns:
        ``num_bits`` arrays of one number a query, the lowest bit first.
    """
    if not len(keys) or not len(query_keys):
        return [np.zeros_like(query_keys)] * num_bits
    # One sorted number for (key, rank of the moment) makes every query two binary searches.
    known_moments = np.unique(moments)
    stride = len(known_moments) + 1
    keys, query_keys = _small_keys(keys, query_keys, most=2 ** (62 - num_bits) // stride)
    # With the marks in the lowest bits numbers are sorted, which is much faster than their places.
    marked = ((keys * stride + np.searchsorted(known_moments, moments)) << num_bits) + marks
    marked.sort()
    addresses = marked >> num_bits

    # searchsorted's left side gives the number of known moments strictly before the query.
    wanted = query_keys * stride + np.searchsorted(known_moments, query_moments)
    # A search finds the memory of the one before it at hand when they go in the order of addresses.
    order = np.argsort(wanted)
    start = np.searchsorted(addresses, query_keys[order] * stride)
    end = np.searchsorted(addresses, wanted[order])
    counts = []
    for bit in range(num_bits):
        until = np.concatenate([[0], np.cumsum((marked >> bit) & 1)])
        count = np.empty_like(wanted)
        count[order] = until[end] - until[start]
        counts.append(count)
    return counts


def _small_keys(keys: Ints, query_keys: Ints, *, most: int) -> tuple[Ints, Ints]:
    """Give keys and queries as whole numbers in 0..most, equal where they were."""
    lowest = min(int(keys.min()), int(query_keys.min()))
    # Python's numbers: the way from one 64-bit id to another may be longer than 64 bits.
    if max(int(keys.max()), int(query_keys.max())) - lowest <= most:
        return keys - lowest, query_keys - lowest
    _, codes = np.unique(np.concatenate([keys, query_keys]), return_inverse=True)
    return codes[: len(keys)], codes[len(keys) :]


def _rates(keys: Ints, past: PastEvents, asked_keys: Ints, asked: Questions) -> Rates:
    counts, likes = count_before(keys, past.moments, past.likes, asked_keys, asked.moments)
    return Rates(counts=counts.astype(np.float64), likes=likes.astype(np.float64))


def _explode(histories: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Give (index of the row, item) for every item of every history."""
    lengths = [len(history) for history in histories]
    items = np.fromiter(chain.from_iterable(histories), dtype=np.int64, count=sum(lengths))
    return np.repeat(np.arange(len(lengths)), lengths), items


def _explode_genres(
    items: Ints, genres_by_item: Mapping[int, Sequence[str]], codes: Mapping[str, int]
) -> tuple[Ints, Ints]:
    """Give (index of the row, code of the genre) for every genre of every row's item."""
    names = [genres_by_item.get(item, ()) for item in items.tolist()]
    parents = np.repeat(np.arange(len(names)), [len(row) for row in names])
    return parents, np.array([codes[name] for row in names for name in row], dtype=np.int64)


def _sum_by_row(rows: Ints, values: Ints, num_rows: int) -> Floats:
    return np.bincount(rows, values, minlength=num_rows).astype(np.float64)


def _mean_by_row(rows: Ints, values: Ints | Floats, num_rows: int) -> Floats:
    total = np.bincount(rows, weights=values, minlength=num_rows)
    count = np.bincount(rows, minlength=num_rows)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
