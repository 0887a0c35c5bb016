"""Prepared datasets as training examples of the library's tasks.

A history holds what happened strictly before the request, statistics count strictly earlier events
of all members, and items that nothing is known of are left out.

    movie-like        films that a member rated, liked from 4 stars and disliked up to 3
    movie-rating      the same with the stars as labels
    similar-item      the source is what the member liked last. From ratings: what the member liked
                      next, beside items that others had liked by then and this member never
                      rated. From impressions: what was shown, clicked or not
    search-relevance  the judged items of a query, with their grade
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from rankonce.datasets.candidate_lists import impression_lists, query_lists
from rankonce.datasets.common_form import Dataset
from rankonce.datasets.ml_small import add_histories, add_passed_over
from rankonce.datasets.movielens import MovieRows, movie_examples, movie_numbers, read_films
from rankonce.datasets.statistics import read_past, read_questions
from rankonce.errors import DataError
from rankonce.prompts.features import Ints, count_before
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

# These names are the only link to the tasks of the library.
MOVIE_LIKE, MOVIE_RATING = "movie-like", "movie-rating"
SIMILAR_ITEM, SEARCH_RELEVANCE = "similar-item", "search-relevance"
# Stars; what lies between says neither.
_LIKE, _DISLIKE = 4.0, 3.0


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """How examples are made.

    Attributes:
        candidates_per_example: at most, where the data do not say what was shown.
        max_members: take the first members of the file only, which are no special ones; their
            statistics still count everybody.
        max_history: the newest events that a request carries; the task may keep fewer.
        passed_over_per_like: items drawn beside each liked one where nothing says what was shown.
        seed: of that draw.
    """

    candidates_per_example: int = 24
    max_members: int | None = None
    max_history: int = 100
    passed_over_per_like: int = 4
    seed: int = 0


def make_examples(
    dataset: Dataset, task: str, config: ExampleConfig | None = None
) -> Iterator[TrainingExample]:
    """Make the examples of a task that the dataset serves.

    Raises:
        DataError: it does not serve that task.
    """
    if task not in dataset.tasks or task not in _MAKERS:
        raise DataError(
            f"task: {dataset.name} serves {', '.join(dataset.tasks)}, should be one of these, "
            f"is {task!r}"
        )
    return _MAKERS[task](dataset, config or ExampleConfig())


def movie_rows_of(dataset: Dataset, *, max_members: int | None = None) -> MovieRows:
    """Bring ratings of films into the rows that ``datasets.movielens`` makes requests of.

    ``movie_rows_of(dataset).rows`` also has the columns that ``rankonce evaluate`` takes.
    """
    ratings, titled = _read_ratings(dataset)
    clear = ratings.filter((pl.col("value") >= _LIKE) | (pl.col("value") <= _DISLIKE))
    known = clear.with_columns(label=(pl.col("value") >= _LIKE).cast(pl.Int8)).sort(
        "timestamp", "user_id", "item_id"
    )
    chosen = known if max_members is None else known.filter(pl.col("user_id") < max_members)
    rows = add_histories(chosen, chosen)
    films = read_films(titled)
    moments = {
        (user, film): when
        for user, film, when in rows.select("user_id", "item_id", "timestamp").iter_rows()
    }
    # Without the histories of all members: what is liked together costs too much for large sets.
    return MovieRows(
        rows=rows,
        films=films,
        numbers=movie_numbers(read_past(known), read_questions(rows), films),
        moments=moments,
    )


def _like_examples(dataset: Dataset, config: ExampleConfig) -> Iterator[TrainingExample]:
    movies = movie_rows_of(dataset, max_members=config.max_members)
    return movie_examples(movies, candidates_per_example=config.candidates_per_example)


def _rating_examples(dataset: Dataset, config: ExampleConfig) -> Iterator[TrainingExample]:
    ratings, titled = _read_ratings(dataset)
    films = read_films(titled)
    items, moments, users = (
        ratings[name].to_numpy() for name in ("item_id", "timestamp", "user_id")
    )
    # Half stars are counted as whole numbers.
    halves = (ratings["value"].to_numpy() * 2).astype(np.int64)
    groups = [
        (start, first, min(first + config.candidates_per_example, end))
        for start, end in _members(users, config.max_members)
        for first in range(start, end, config.candidates_per_example)
    ]
    # Candidates are described as of the request, not as of their own row.
    firsts = [first for _, first, end in groups for _ in range(first, end)]
    num_raters, _ = count_before(
        items, moments, np.ones_like(items), items[: len(firsts)], moments[firsts]
    )
    for start, first, end in groups:
        now = int(moments[first])
        before = start + int(np.searchsorted(moments[start:first], now))
        profile: dict[str, Value] = {"num_ratings": before - start}
        if before > start:
            profile["mean_rating"] = float(halves[start:before].mean()) / 2
        history = tuple(
            Event(
                item=Item(fields=films[int(items[row])]),
                action=_stars_in_words(int(halves[row])),
                time=float(moments[row]),
            )
            for row in range(max(start, before - config.max_history), before)
        )
        candidates = tuple(
            Item(
                id=str(titled["item"][int(items[row])]),
                fields=_rated(films, items, num_raters, row),
            )
            for row in range(first, end)
        )
        yield TrainingExample(
            request=ScoreRequest(
                task=MOVIE_RATING,
                time=float(now),
                profile=profile,
                history=history,
                candidates=candidates,
            ),
            labels=tuple(str(_whole_stars(int(halves[row]))) for row in range(first, end)),
        )


def _rated(
    films: Mapping[int, Mapping[str, Value]], items: Ints, num_raters: Ints, row: int
) -> dict[str, Value]:
    fields = dict(films[int(items[row])])
    if num_raters[row]:
        fields["num_raters"] = int(num_raters[row])
    return fields


def _whole_stars(halves: int) -> int:
    """Round half stars up: 0.5 is 1 and 3.5 is 4."""
    return (halves + 1) // 2


def _stars_in_words(halves: int) -> str:
    stars = _whole_stars(halves)
    return "1 star" if stars == 1 else f"{stars} stars"


def _similar_examples(dataset: Dataset, config: ExampleConfig) -> Iterator[TrainingExample]:
    if dataset.has_impressions:
        for shown in impression_lists(dataset, max_history=config.max_history):
            if shown.member_number >= (config.max_members or shown.member_number + 1):
                return
            yield shown.example
        return
    ratings, titled = _read_ratings(dataset)
    fields = read_films(titled)
    if config.max_members is not None:
        ratings = ratings.filter(pl.col("user_id") < config.max_members)
    rated = ratings.with_columns(label=(pl.col("value") >= _LIKE).cast(pl.Int8))
    likes = rated.filter(pl.col("label") == 1)
    rows = add_passed_over(
        add_histories(likes, likes), rated, per_like=config.passed_over_per_like, seed=config.seed
    )
    moments = {
        (user, item): when
        for user, item, when in likes.select("user_id", "item_id", "timestamp").iter_rows()
    }
    groups = rows.group_by("user_id", "timestamp", maintain_order=True).agg(
        "item_id", "label", pl.col("history_ids").first()
    )
    for user, now, items, labels, past in groups.sort("user_id", "timestamp").iter_rows():
        if not past:
            continue
        *earlier, source = past
        profile: dict[str, Value] = {"source_title": fields[source]["title"]}
        if "genres" in fields[source]:
            profile["source_genres"] = fields[source]["genres"]
        yield TrainingExample(
            request=ScoreRequest(
                task=SIMILAR_ITEM,
                time=float(now),
                profile=profile,
                history=tuple(
                    Event(
                        item=Item(fields=fields[item]),
                        action="liked",
                        # An item that was rated again later was liked at the latest just now.
                        time=float(min(moments[user, item], now - 1)),
                    )
                    for item in earlier[-config.max_history :]
                ),
                candidates=tuple(
                    Item(id=str(titled["item"][item]), fields=fields[item]) for item in items
                ),
            ),
            labels=tuple("Yes" if label else "No" for label in labels),
        )


def _relevance_examples(dataset: Dataset, config: ExampleConfig) -> Iterator[TrainingExample]:
    for judged in query_lists(dataset):
        for start in range(0, len(judged.grades), config.candidates_per_example):
            yield judged.part(start, start + config.candidates_per_example).example


_MAKERS: dict[str, Callable[[Dataset, ExampleConfig], Iterator[TrainingExample]]] = {
    MOVIE_LIKE: _like_examples,
    MOVIE_RATING: _rating_examples,
    SIMILAR_ITEM: _similar_examples,
    SEARCH_RELEVANCE: _relevance_examples,
}


def _read_ratings(dataset: Dataset) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read dated events with a value, and the items that have a title.

    Returns:
        user_id (0, 1, ... in the file's order), item_id, value, timestamp, each member's in the
        order of time; and item_id, item, title, genres in the order of item_id.
    """
    titled = (
        dataset.read("items")
        .filter(pl.col("title").is_not_null())
        .select("item", "title", genres=pl.col("categories").list.join("|"))
        .with_row_index("item_id")
        .with_columns(pl.col("item_id").cast(pl.Int64))
        .collect()
    )
    events = (
        dataset.read("events")
        .filter(pl.col("value").is_not_null() & pl.col("time").is_not_null())
        .select("member", "item", "value", timestamp="time")
        .join(titled.lazy().select("item", "item_id"), on="item", maintain_order="left")
        .select(
            "item_id",
            "value",
            "timestamp",
            # The events of a member stand together.
            user_id=pl.col("member").rle_id().cast(pl.Int64),
        )
        .collect()
    )
    return events, titled


def _members(users: Ints, most: int | None) -> list[tuple[int, int]]:
    """Give the half-open range of rows of each member."""
    starts = np.searchsorted(users, np.arange(users[-1] + 2 if len(users) else 1)).tolist()
    return list(pairwise(starts))[:most]


def _texts(value: Value) -> list[str]:
    return value if isinstance(value, list) else []
