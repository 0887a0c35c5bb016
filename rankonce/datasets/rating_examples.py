"""Dated ratings as training examples of the library's tasks.

A history holds what happened strictly before the request, and statistics count strictly earlier
ratings of all members.

    movie-like     films that a member rated, liked from 4 stars and disliked up to 3
    movie-rating   the same with the stars as labels
    similar-item   the source is what the member liked last; candidates are what the member liked
                   next, beside items that others had liked by then and this member never rated
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import polars as pl

from rankonce.datasets.ml_small import LIKE, add_histories, add_passed_over, label_likes
from rankonce.datasets.movielens import MovieRows, movie_examples, movie_numbers
from rankonce.datasets.statistics import read_past, read_questions
from rankonce.prompts.features import (
    YEAR,
    Floats,
    Ints,
    PastEvents,
    Questions,
    count_before,
    standing_percentile,
)
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """How examples are made.

    Attributes:
        candidates_per_example: at most, where the data do not say what was shown.
        max_members: take the first members of the data only, which are no special ones; their
            statistics still count everybody.
        max_history: the newest events that a request carries, ``None`` is all of them; the task
            may keep fewer.
        passed_over_per_like: items drawn beside each liked one where nothing says what was shown.
        co_likes: also say of films what others liked together, which takes the histories of all
            members: too much for large sets.
        seed: of that draw.
    """

    candidates_per_example: int = 24
    max_members: int | None = None
    max_history: int | None = 100
    passed_over_per_like: int = 4
    co_likes: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings of items that have a title.

    Attributes:
        rows: user_id, item_id, value (0.5-5), timestamp (s); those of a member stand together, in
            the order of time.
        fields: title and genres of every item.
        names: what the source calls each item.
    """

    rows: pl.DataFrame
    fields: Mapping[int, Mapping[str, Value]]
    names: Mapping[int, str]

    def of_members(self, most: int | None) -> pl.DataFrame:
        """Return the rows of the first members, of all by default."""
        if most is None:
            return self.rows
        first = self.rows["user_id"].unique(maintain_order=True).head(most)
        return self.rows.filter(pl.col("user_id").is_in(first.implode()))

    def item(self, item: int, numbers: Mapping[str, Value] | None = None) -> Item:
        """Make a candidate."""
        return Item(id=self.names[item], fields={**self.fields[item], **(numbers or {})})


def rating_examples(
    ratings: Ratings, task: str, config: ExampleConfig
) -> Iterator[tuple[int, TrainingExample]]:
    """Make the examples of one of ``RATING_TASKS``, each with its user_id."""
    return RATING_TASKS[task](ratings, config)


def like_rows(
    ratings: Ratings,
    *,
    max_members: int | None = None,
    co_likes: bool = False,
    rows_per_request: int = 1,
) -> MovieRows:
    """Bring ratings of films into the rows that ``datasets.movielens`` makes requests of.

    Args:
        co_likes: as in ``ExampleConfig``.
        rows_per_request: so many rows of a member are asked at one time, that of the first of
            them: what was known then is said of all.

    Returns:
        Their ``rows`` also have the columns that ``rankonce evaluate`` takes.
    """
    known = label_likes(ratings.rows, "value")
    chosen = known
    if max_members is not None:
        chosen = label_likes(ratings.of_members(max_members), "value")
    asked = chosen.with_columns(
        pl.col("timestamp").first().over("user_id", _request_numbers(rows_per_request))
    )
    rows = add_histories(asked, chosen)
    past = read_past(add_histories(known, known) if co_likes else known)
    return MovieRows(
        rows=rows,
        films=ratings.fields,
        numbers=movie_numbers(past, read_questions(rows), ratings.fields),
        moments={
            (user, film): when
            for user, film, when in chosen.select("user_id", "item_id", "timestamp").iter_rows()
        },
    )


def _request_numbers(rows_per_request: int) -> pl.Expr:
    """Number the requests of each member, whose rows stand in the order of time."""
    return pl.int_range(pl.len()).over("user_id") // rows_per_request


def _like_examples(
    ratings: Ratings, config: ExampleConfig
) -> Iterator[tuple[int, TrainingExample]]:
    movies = like_rows(
        ratings,
        max_members=config.max_members,
        co_likes=config.co_likes,
        rows_per_request=config.candidates_per_example,
    )
    users, films = movies.rows["user_id"].to_list(), movies.rows["item_id"].to_list()
    for example in movie_examples(movies, candidates_per_example=config.candidates_per_example):
        request = example.request
        # These candidates bear the numbers of their rows.
        places = [int(str(candidate.id)) for candidate in request.candidates]
        named = tuple(
            replace(candidate, id=ratings.names[films[place]])
            for place, candidate in zip(places, request.candidates, strict=True)
        )
        yield users[places[0]], replace(example, request=replace(request, candidates=named))


def _rating_examples(
    ratings: Ratings, config: ExampleConfig
) -> Iterator[tuple[int, TrainingExample]]:
    rows = ratings.of_members(config.max_members)
    items, moments, users = (rows[name].to_numpy() for name in ("item_id", "timestamp", "user_id"))
    # Half stars are counted as whole numbers.
    halves = (rows["value"].to_numpy() * 2).astype(np.int64)
    groups = [
        (start, first, min(first + config.candidates_per_example, end))
        for start, end in _members(users)
        for first in range(start, end, config.candidates_per_example)
    ]
    # Candidates are described as of the request, not as of their own row.
    firsts = [first for _, first, end in groups for _ in range(first, end)]
    num_raters, popularity = _popularity(ratings, items, moments[firsts])
    events = [
        Event(
            item=Item(fields=ratings.fields[item]), action=_stars_in_words(half), time=float(moment)
        )
        for item, half, moment in zip(
            items.tolist(), halves.tolist(), moments.tolist(), strict=True
        )
    ]
    for start, first, end in groups:
        now = int(moments[first])
        before = start + int(np.searchsorted(moments[start:first], now))
        profile: dict[str, Value] = {"num_ratings": before - start}
        if before > start:
            profile["mean_rating"] = float(halves[start:before].mean()) / 2
        candidates = tuple(
            ratings.item(int(items[row]), _known(num_raters[row], popularity[row]))
            for row in range(first, end)
        )
        request = ScoreRequest(
            task="movie-rating",
            time=float(now),
            profile=profile,
            history=newest(events[start:before], config.max_history),
            candidates=candidates,
        )
        labels = tuple(str(_whole_stars(int(halves[row]))) for row in range(first, end))
        yield int(users[first]), TrainingExample(request=request, labels=labels)


def newest(events: Sequence[Event], count: int | None) -> tuple[Event, ...]:
    """Take the newest of events that stand in the order of time, all of them for ``None``."""
    return tuple(events if count is None else events[max(0, len(events) - count) :])


def _popularity(ratings: Ratings, items: Ints, moments: Ints) -> tuple[Ints, Floats]:
    """Count the raters of items by some moments, and their place among all items."""
    rows = ratings.rows
    members, rated, times = (rows[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    past = PastEvents(members=members, items=rated, moments=times, likes=np.ones_like(rated))
    asked = Questions(members=np.zeros_like(items), items=items, moments=moments)
    counts, _ = count_before(rated, times, past.likes, items, moments)
    num_items = len(ratings.fields)
    return counts, standing_percentile(past, asked, num_items=num_items, period_s=YEAR)


def _known(num_raters: np.int64, popularity: np.float64) -> dict[str, Value]:
    known: dict[str, Value] = {"num_raters": int(num_raters)} if num_raters else {}
    return known if np.isnan(popularity) else {**known, "popularity": float(popularity)}


def _whole_stars(halves: int) -> int:
    """Round half stars up: 0.5 is 1 and 3.5 is 4."""
    return (halves + 1) // 2


def _stars_in_words(halves: int) -> str:
    stars = _whole_stars(halves)
    return "1 star" if stars == 1 else f"{stars} stars"


def _similar_examples(
    ratings: Ratings, config: ExampleConfig
) -> Iterator[tuple[int, TrainingExample]]:
    rated = ratings.of_members(config.max_members).with_columns(
        label=(pl.col("value") >= LIKE).cast(pl.Int8)
    )
    likes = rated.filter(pl.col("label") == 1).sort("timestamp", "item_id")
    rows = add_passed_over(likes, rated, per_like=config.passed_over_per_like, seed=config.seed)
    liked: dict[int, tuple[list[int], list[int], list[Event]]] = {}
    for user, item, when in likes.select("user_id", "item_id", "timestamp").iter_rows():
        items, moments, events = liked.setdefault(user, ([], [], []))
        items.append(item)
        moments.append(when)
        events.append(
            Event(item=Item(fields=ratings.fields[item]), action="liked", time=float(when))
        )
    groups = rows.group_by("user_id", "timestamp", maintain_order=True).agg("item_id", "label")
    for user, now, candidates, labels in groups.sort("user_id", "timestamp").iter_rows():
        items, moments, events = liked[user]
        source = bisect_left(moments, now) - 1
        if source < 0:
            continue
        fields = ratings.fields[items[source]]
        request = ScoreRequest(
            task="similar-item",
            time=float(now),
            profile={f"source_{name}": value for name, value in fields.items()},
            history=newest(events[:source], config.max_history),
            candidates=tuple(map(ratings.item, candidates)),
        )
        answers = tuple("Yes" if label else "No" for label in labels)
        yield user, TrainingExample(request=request, labels=answers)


RATING_TASKS: Mapping[
    str, Callable[[Ratings, ExampleConfig], Iterator[tuple[int, TrainingExample]]]
] = {
    "movie-like": _like_examples,
    "movie-rating": _rating_examples,
    "similar-item": _similar_examples,
}


def _members(users: Ints) -> list[tuple[int, int]]:
    """Give the half-open range of rows of each member."""
    starts = [0, *(np.flatnonzero(np.diff(users)) + 1).tolist(), len(users)]
    return list(pairwise(starts)) if len(users) else []
