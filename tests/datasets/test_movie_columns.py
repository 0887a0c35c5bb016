"""Columns of rows: each looks back only, and counts what a slow count does."""

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from rankonce.datasets.movie_columns import past_features
from rankonce.errors import DataError

ITEMS = pl.DataFrame(
    {
        "item_id": range(8),
        "title": [f"Film {index} ({1980 + index})" for index in range(7)] + ["Film without a year"],
        "genres": ["Drama", "Drama|Crime", "Crime", "", "Comedy", "Comedy|Drama", "War", "War"],
    }
)


def draw_rows(num_rows: int, *, start: int = 0, seed: int = 0) -> pl.DataFrame:
    """Draw rows, several a second, whose histories are the user's likes of earlier seconds."""
    generator = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": generator.integers(0, 5, num_rows),
            "item_id": generator.integers(0, 8, num_rows),
            "label": generator.integers(0, 2, num_rows),
            "timestamp": start + np.sort(generator.integers(0, num_rows // 2, num_rows)),
        }
    )
    histories = [
        frame.filter(
            pl.col("user_id") == row["user_id"],
            pl.col("timestamp") < row["timestamp"],
            pl.col("label") == 1,
        )["item_id"].to_list()
        for row in frame.iter_rows(named=True)
    ]
    return frame.with_columns(pl.Series("history_ids", histories, dtype=pl.List(pl.Int64)))


@pytest.mark.parametrize("seed", range(5))
def test_no_label_and_no_row_of_the_same_second_or_later_changes_a_train_row(seed: int) -> None:
    train = draw_rows(80, seed=seed)
    features = past_features(train, ITEMS, train)
    for moment in (5, 20, 35):
        until, since = train["timestamp"] <= moment, train["timestamp"] >= moment
        flipped = train.with_columns(
            label=pl.when(since).then(1 - pl.col("label")).otherwise("label")
        )
        replaced = pl.concat([train.filter(until), draw_rows(40, start=moment, seed=seed + 99)])
        for changed in (flipped, replaced):
            found = past_features(changed, ITEMS, train.filter(until))
            assert_frame_equal(found, features.filter(until))


def test_co_likes_equal_a_slow_count_over_earlier_rows() -> None:
    train = draw_rows(80)
    features = past_features(train, ITEMS, train)
    past_rows = list(train.iter_rows(named=True))
    for index, row in enumerate(past_rows):
        rated = likes = both = 0
        for film in row["history_ids"]:
            for other in past_rows:
                if other["timestamp"] >= row["timestamp"]:
                    continue
                # A history may hold a film several times; each entry is a pair of its own.
                after = other["history_ids"].count(film) * (other["item_id"] == row["item_id"])
                before = other["history_ids"].count(row["item_id"]) * (other["item_id"] == film)
                rated += after
                likes += after * other["label"]
                both += (after + before) * other["label"]
        found = features.row(index, named=True)
        assert (found["co_count"], found["co_likes"]) == (rated, both)
        prior = found["item_share"]
        assert found["co_share"] == pytest.approx((likes + 10 * prior) / (rated + 10))


def test_features_of_the_film_and_the_history_are_read_from_titles_and_genres() -> None:
    train = draw_rows(80)
    row = pl.DataFrame(
        {
            "user_id": [1, 1],
            "item_id": [1, 7],
            "timestamp": [999, 999],
            "history_ids": [[0, 2], []],
        },
        schema_overrides={"history_ids": pl.List(pl.Int64)},
    )
    first, second = past_features(train, ITEMS, row).fill_nan(None).iter_rows(named=True)
    assert (first["year"], first["history_year"], first["year_gap"]) == (1981, 1981, 0)
    assert (first["num_genres"], first["is_Crime"], first["is_War"]) == (2, 1, 0)
    assert (first["history_length"], first["history_genre_share"]) == (2, 0.5)
    assert (second["year"], second["history_length"], second["history_year"]) == (None, 0, None)


def test_features_without_a_history_or_titles_are_refused_by_name() -> None:
    rows = draw_rows(40)
    with pytest.raises(DataError, match="history_ids: should be a column of lists"):
        past_features(rows, ITEMS, rows.drop("history_ids"))
    with pytest.raises(DataError, match="title: should be a text column"):
        past_features(rows, ITEMS.drop("title"), rows)
