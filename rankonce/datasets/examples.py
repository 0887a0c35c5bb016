"""Prepared datasets as training examples of the library's tasks.

    movie-like, movie-rating   from ratings (``datasets.rating_examples``)
    other tasks of films       from sets of MovieLens (``datasets.domains.films``)
    similar-item               the source is what the member liked last. From impressions: what
                               was shown, clicked or not. Else from ratings
    search-relevance           the judged items of a query, with their grade

Items that nothing is known of are left out.
"""

from collections.abc import Iterator

import polars as pl

from rankonce.datasets.candidate_lists import impression_lists, query_lists
from rankonce.datasets.common_form import Dataset
from rankonce.datasets.domains.films import (
    FILM_TASKS,
    MAX_EVENTS,
    film_examples_by_member,
)
from rankonce.datasets.movielens import MovieRows, read_films
from rankonce.datasets.rating_examples import (
    RATING_TASKS,
    ExampleConfig,
    Ratings,
    like_rows,
    rating_examples,
)
from rankonce.errors import DataError
from rankonce.records import TrainingExample


def make_examples(
    dataset: Dataset, task: str, config: ExampleConfig | None = None
) -> Iterator[TrainingExample]:
    """Make the examples of a task that the dataset serves.

    Raises:
        DataError: it does not serve that task.
    """
    return (example for _, example in make_examples_by_member(dataset, task, config))


def make_examples_by_member(
    dataset: Dataset, task: str, config: ExampleConfig | None = None
) -> Iterator[tuple[str, TrainingExample]]:
    """Make the examples of ``make_examples``, each with its member or query.

    Raises:
        DataError: the dataset does not serve that task.
    """
    config = config or ExampleConfig()
    if task in dataset.tasks:
        if task == "search-relevance":
            return _relevance_examples(dataset, config)
        if dataset.has_impressions:
            return _shown_examples(dataset, config)
        if task in FILM_TASKS:
            films = film_examples_by_member(
                task,
                dataset.folder,
                seed=config.seed,
                max_members=config.max_members,
                max_events=MAX_EVENTS if config.max_history is not None else None,
            )
            return ((str(member), example) for member, example in films)
        if task in RATING_TASKS:
            made = rating_examples(read_ratings(dataset), task, config)
            return ((str(member), example) for member, example in made)
    raise DataError(
        f"task: {dataset.name} serves {', '.join(dataset.tasks)}, should be one of these, "
        f"is {task!r}"
    )


def movie_rows_of(dataset: Dataset, *, max_members: int | None = None) -> MovieRows:
    """Bring ratings of films into the rows that ``datasets.movielens`` makes requests of.

    ``movie_rows_of(dataset).rows`` also has the columns that ``rankonce evaluate`` takes.
    """
    return like_rows(read_ratings(dataset), max_members=max_members)


def _shown_examples(
    dataset: Dataset, config: ExampleConfig
) -> Iterator[tuple[str, TrainingExample]]:
    for shown in impression_lists(dataset, max_history=config.max_history):
        if shown.member_number >= (config.max_members or shown.member_number + 1):
            return
        yield str(shown.member_number), shown.example


def _relevance_examples(
    dataset: Dataset, config: ExampleConfig
) -> Iterator[tuple[str, TrainingExample]]:
    for judged in query_lists(dataset):
        for start in range(0, len(judged.grades), config.candidates_per_example):
            part = judged.part(start, start + config.candidates_per_example)
            yield str(judged.request.id), part.example


def read_ratings(dataset: Dataset) -> Ratings:
    """Read dated events with a value, of the items that have a title.

    Members are numbered 0, 1, ... in the file's order.
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
    names = dict(titled.select("item_id", "item").iter_rows())
    return Ratings(rows=events, fields=read_films(titled), names=names)
