"""Rows become requests: nothing in a prompt comes from its own row or a later one."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from rankonce.datasets.ml_small import add_passed_over, read_ml_small, split_each_member
from rankonce.datasets.movielens import movie_examples, movie_rows, read_films, read_rows
from rankonce.errors import DataError
from rankonce.records import TrainingExample
from tests.conftest import data_folder

ITEMS = pl.DataFrame(
    {
        "item_id": [1, 2, 3, 4],
        "title": ["Heat (1995)", "Alien (1979)", "Up (2009)", "M (1931)"],
        "genres": ["Action|Crime", "Horror|Sci-Fi", "Animation", ""],
    }
)
ROWS = pl.DataFrame(
    {
        "user_id": [1, 1, 1, 2, 2],
        "item_id": [1, 2, 3, 1, 4],
        "label": [1, 0, 1, 1, 0],
        "timestamp": [10, 20, 30, 40, 40],
        "history_ids": [[], [1], [1], [], [1]],
    }
)


def by_row(examples: list[TrainingExample]) -> dict[str, object]:
    """What each row's prompt says: profile, history and its own fields."""
    return {
        str(candidate.id): (
            example.request.profile,
            example.request.history,
            candidate.fields,
        )
        for example in examples
        for candidate in example.request.candidates
    }


def examples_of(rows: pl.DataFrame, **options: object) -> list[TrainingExample]:
    movies = movie_rows(rows, ITEMS)
    return list(movie_examples(movies, candidates_per_example=10, shared_history=False, **options))  # type: ignore[arg-type]


def test_a_history_holds_the_likes_before_the_row_in_the_order_of_time() -> None:
    movies = movie_rows(ROWS, ITEMS)
    assert movies.history(0) == []
    assert movies.history(1) == [(1, 10)]
    assert movies.history(2) == [(1, 10)]


def test_no_later_row_and_no_own_label_changes_a_prompt() -> None:
    expected = by_row(examples_of(ROWS))
    for index in range(ROWS.height):
        now = ROWS["timestamp"][index]
        flipped = ROWS.with_columns(
            label=pl.when(pl.col("timestamp") >= now)
            .then(1 - pl.col("label"))
            .otherwise(pl.col("label"))
        )
        assert by_row(examples_of(flipped))[str(index)] == expected[str(index)]


def test_statistics_of_served_rows_come_from_the_train_rows() -> None:
    train, rows = ROWS.head(3), ROWS.tail(2)
    movies = movie_rows(rows, ITEMS, train=train)
    (example,) = movie_examples(movies, candidates_per_example=10)
    fields = {c.id: c.fields for c in example.request.candidates}
    assert example.request.profile == {"num_ratings": 0}
    assert fields["0"]["num_raters"] == 1
    assert "num_raters" not in fields["1"]
    assert "genres" not in fields["1"]
    assert example.labels == ("Yes", "No")


def test_a_seed_shuffles_and_cuts_but_keeps_every_row_once() -> None:
    for seed in range(5):
        movies = movie_rows(ROWS, ITEMS)
        examples = list(movie_examples(movies, candidates_per_example=2, seed=seed))
        ids = [candidate.id for example in examples for candidate in example.request.candidates]
        assert sorted(map(str, ids)) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("rows", "items", "message"),
    [
        (ROWS.drop("history_ids"), ITEMS, "history_ids"),
        (ROWS.drop("timestamp"), ITEMS, "timestamp"),
        (ROWS.drop("item_id"), ITEMS, "item_id"),
        (ROWS.with_columns(history_ids=pl.lit(3)), ITEMS, "history_ids: should be lists"),
        (
            ROWS.with_columns(history_ids=pl.Series([[], [None], [1], [], [1]])),
            ITEMS,
            "history_ids: should hold whole numbers without nulls",
        ),
        (ROWS, ITEMS.head(2), "are in no row of items"),
        (ROWS, ITEMS.drop("title"), "title"),
    ],
)
def test_missing_columns_and_films_are_named(
    rows: pl.DataFrame, items: pl.DataFrame, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        movie_rows(rows, items)


def test_a_file_that_is_not_parquet_is_named(tmp_path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("no")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read_rows(path)


def test_films_passed_over_are_unrated_and_known_by_then() -> None:
    ratings, items = read_ml_small(data_folder("ml-small"))
    ratings = ratings.head(8000)
    rows = add_passed_over(ratings, ratings, per_like=2, seed=0)
    added = rows.join(ratings, on=["user_id", "item_id"], how="anti")
    assert rows.height - added.height == ratings.height
    assert added["label"].sum() == 0
    assert added.height > ratings["label"].sum()
    first_like = ratings.filter(pl.col("label") == 1).group_by("item_id").agg(pl.min("timestamp"))
    known = added.join(first_like, on="item_id", suffix="_first_like")
    assert known.height == added.height
    assert (known["timestamp_first_like"] < known["timestamp"]).all()
    again = add_passed_over(ratings, ratings, per_like=2, seed=0)
    assert again.equals(rows)
    assert len(read_films(items)) == items.height


def test_the_held_out_rows_of_a_member_are_the_newest() -> None:
    ratings, _ = read_ml_small(data_folder("ml-small"))
    early, late = split_each_member(ratings, held_out_share=0.1)
    assert early.height + late.height == ratings.height
    last = dict(early.group_by("user_id").agg(pl.max("timestamp")).iter_rows())
    assert all(last[user] <= when for user, when in late.select("user_id", "timestamp").iter_rows())
    assert late.height / ratings.height == pytest.approx(0.1, abs=0.01)


def test_real_rows_have_dated_histories_that_end_before_them() -> None:
    folder = data_folder("ml1m")
    train, valid, items = (read_rows(folder / f"{n}.parquet") for n in ("train", "valid", "items"))
    movies = movie_rows(valid, items, train=train)
    for index in np.random.default_rng(0).integers(valid.height, size=200).tolist():
        history = movies.history(index)
        moments = [when for _, when in history]
        assert moments == sorted(moments)
        assert all(0 < when <= valid["timestamp"][index] for when in moments)
        assert [film for film, _ in history] == valid["history_ids"][index].to_list()


def test_requests_of_rows_without_labels_have_unknown_labels() -> None:
    movies = movie_rows(ROWS, ITEMS)
    (example, *_) = movie_examples(
        replace(movies, rows=ROWS.drop("label")), candidates_per_example=10
    )
    assert set(example.labels) == {None}


def test_a_taught_share_takes_the_place_of_labels() -> None:
    rows = ROWS.with_columns(label=pl.Series([1, 0, None, 1, None], dtype=pl.Int64))
    taught = np.array([0.5, 0.5, 0.25, 0.75, 0.125])
    movies = movie_rows(rows, ITEMS, train=ROWS, taught=taught)
    shares = {
        candidate.id: label
        for example in movie_examples(movies, candidates_per_example=10)
        for candidate, label in zip(example.request.candidates, example.labels, strict=True)
    }
    assert shares == {
        str(row): {"Yes": share, "No": 1 - share} for row, share in enumerate(taught.tolist())
    }
    untaught = movie_rows(rows, ITEMS, train=ROWS)
    labels = [one for e in movie_examples(untaught, candidates_per_example=10) for one in e.labels]
    assert labels == ["Yes", "No", None, "Yes", None]


def test_what_is_taught_is_never_told() -> None:
    plain, taught = (movie_rows(ROWS, ITEMS, taught=share) for share in (None, np.full(5, 0.9)))
    told = [
        [example.request for example in movie_examples(movies, candidates_per_example=3)]
        for movies in (plain, taught)
    ]
    assert told[0] == told[1]
