"""Past-only statistics against brute force, and the proof that nothing leaks."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from rankonce.datasets.statistics import past_statistics, statistics_from
from rankonce.errors import DataError
from rankonce.prompts.features import smoothed_share
from tests.conftest import data_folder

GENRES = {0: ["Drama"], 1: ["Drama", "Crime"], 2: [], 3: ["Crime", "Comedy", "Drama"]}
COLUMNS = ["user_id", "item_id", "label", "timestamp"]
# Few users, items and moments, so that most rows meet others of the same second; item 4 has no
# entry among the genres.
ROW = st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 1), st.integers(0, 5))
ROWS = st.lists(ROW, min_size=1, max_size=25)


def build_frame(rows: list[tuple[int, int, int, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.Int64), orient="row")


def count_slowly(train: pl.DataFrame, row: dict[str, int]) -> list[float | None]:
    past = [other for other in train.iter_rows(named=True) if other["timestamp"] < row["timestamp"]]

    def count(rows: list[dict[str, int]]) -> tuple[int, int]:
        return len(rows), sum(other["label"] for other in rows)

    own = [other for other in past if other["user_id"] == row["user_id"]]
    by_genre = [
        count([other for other in own if genre in GENRES.get(other["item_id"], [])])
        for genre in GENRES.get(row["item_id"], [])
    ]
    return [
        *count([other for other in past if other["item_id"] == row["item_id"]]),
        *count(own),
        (count(past)[1] + 1) / (len(past) + 2),
        *(np.mean(by_genre, axis=0).tolist() if by_genre else [None, None]),
    ]


def assert_counts(statistics: pl.DataFrame, train: pl.DataFrame, rows: pl.DataFrame) -> None:
    for found, row in zip(statistics.rows(), rows.iter_rows(named=True), strict=True):
        for value, expected in zip(found, count_slowly(train, row), strict=True):
            assert value == (None if expected is None else pytest.approx(expected, abs=1e-12))


@given(ROWS)
@settings(deadline=None)
def test_past_statistics_equal_a_slow_count_of_strictly_earlier_rows(
    rows: list[tuple[int, int, int, int]],
) -> None:
    frame = build_frame(rows)
    assert_counts(past_statistics(frame, genres_by_item=GENRES), frame, frame)


@given(ROWS, ROWS)
@settings(deadline=None)
def test_statistics_from_train_equal_a_slow_count_even_where_the_parts_overlap(
    train: list[tuple[int, int, int, int]], rows: list[tuple[int, int, int, int]]
) -> None:
    train_frame, frame = build_frame(train), build_frame(rows).drop("label")
    assert_counts(statistics_from(train_frame, frame, genres_by_item=GENRES), train_frame, frame)


@given(ROWS, ROWS, st.integers(0, 5))
@settings(deadline=None)
def test_no_label_and_no_row_of_the_same_second_or_later_changes_a_row(
    rows: list[tuple[int, int, int, int]],
    others: list[tuple[int, int, int, int]],
    moment: int,
) -> None:
    frame = build_frame(rows)
    earlier = past_statistics(frame, genres_by_item=GENRES).filter(frame["timestamp"] <= moment)
    flipped = frame.with_columns(
        label=pl.when(pl.col("timestamp") >= moment).then(1 - pl.col("label")).otherwise("label")
    )
    # Later rows vanish and foreign ones take their place, all from the moment on.
    replaced = pl.concat(
        [
            frame.filter(pl.col("timestamp") <= moment),
            build_frame(others).with_columns(timestamp=pl.col("timestamp") + moment),
        ]
    )
    for changed in (flipped, replaced):
        found = past_statistics(changed, genres_by_item=GENRES)
        kept = found.filter(changed["timestamp"] <= moment).head(earlier.height)
        assert_frame_equal(kept, earlier)


@given(st.permutations(range(12)))
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_rows_does_not_matter(order: list[int]) -> None:
    generator = np.random.default_rng(0)
    frame = build_frame([tuple(row) for row in generator.integers(0, [3, 4, 2, 6], (12, 4))])
    found = past_statistics(frame[order], genres_by_item=GENRES)
    assert_frame_equal(found, past_statistics(frame, genres_by_item=GENRES)[order])


def test_after_a_split_by_time_every_train_row_counts() -> None:
    train = build_frame([(1, 1, 1, 10), (1, 1, 0, 20), (2, 1, 1, 20)])
    found = statistics_from(train, build_frame([(1, 1, 0, 21), (3, 2, 0, 99)]))
    assert found["item_count"].to_list() == [3, 0]
    assert found["item_likes"].to_list() == [2, 0]
    assert found["user_count"].to_list() == [2, 0]
    assert found["global_share"].to_list() == [0.6, 0.6]


def test_genre_columns_are_null_without_genres() -> None:
    found = past_statistics(build_frame([(1, 1, 1, 10), (1, 1, 0, 20)]))
    assert found["user_genre_count"].to_list() == [None, None]
    assert found.schema["user_genre_likes"] == pl.Float64


def test_ids_of_64_bits_are_counted() -> None:
    large = 2**63 - 1
    train = build_frame([(large, 1, 1, 10), (-large, 1, 1, 10)])
    found = statistics_from(train, build_frame([(large, 1, 0, 11)]), genres_by_item=GENRES)
    assert found.row(0) == (2, 2, 1, 1, 0.75, 1.0, 1.0)


def test_a_smoothed_share_is_the_prior_without_rows_and_the_share_with_many() -> None:
    share = smoothed_share(
        np.array([0, 3, 3_000_000]), np.array([0, 4, 4_000_000]), prior=0.5, strength=4
    )
    assert share == pytest.approx([0.5, 5 / 8, 0.75], abs=1e-6)
    with pytest.raises(DataError, match="strength: should be above 0"):
        smoothed_share(np.array([0]), np.array([0]), prior=0.5, strength=0)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", [0, 2], "label: should be 0 or 1"),
        ("label", [0, None], "label: should be whole numbers without nulls"),
        ("timestamp", [1.5, 2.5], "timestamp: should be whole numbers"),
        ("user_id", ["a", "b"], "user_id: should be whole numbers"),
        ("item_id", None, "item_id: should be a column"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused_by_name(
    column: str, values: list[object] | None, message: str
) -> None:
    frame = build_frame([(1, 1, 1, 10), (1, 1, 0, 20)]).drop(column)
    if values is not None:
        frame = frame.with_columns(pl.Series(column, values))
    with pytest.raises(DataError, match=message):
        past_statistics(frame)


def test_statistics_of_movielens_rows_equal_a_filter_over_the_earlier_rows() -> None:
    folder = data_folder("ml1m")
    train = pl.read_parquet(folder / "train.parquet")
    found = past_statistics(train)
    for index in np.random.default_rng(0).choice(train.height, 100, replace=False).tolist():
        row = train.row(index, named=True)
        past = train.filter(pl.col("timestamp") < row["timestamp"])
        of_item = past.filter(pl.col("item_id") == row["item_id"])
        of_user = past.filter(pl.col("user_id") == row["user_id"])
        expected = (len(of_item), of_item["label"].sum(), len(of_user), of_user["label"].sum())
        assert found.row(index)[:4] == expected
