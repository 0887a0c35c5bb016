"""Baselines on the real rows, and the proof that their features look back only."""

import subprocess
import sys
from functools import cache

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from rankonce.errors import DataError, MissingDependencyError
from rankonce.evaluation.baseline_features import past_features
from rankonce.evaluation.baselines import BASELINES
from rankonce.evaluation.metrics import auc, log_loss, uauc
from tests.conftest import data_folder

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


@cache
def read_movielens() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    folder = data_folder("ml1m")
    train, items, rows = (
        pl.read_parquet(folder / f"{name}.parquet") for name in ("train", "items", "valid")
    )
    return train, items, rows


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


@pytest.mark.parametrize("name", BASELINES)
def test_labels_of_the_rows_to_be_scored_are_not_read(name: str) -> None:
    train, rows = draw_rows(300), draw_rows(40, start=1000, seed=1)
    scores = BASELINES[name](train, ITEMS, rows)
    assert np.array_equal(scores, BASELINES[name](train, ITEMS, rows.drop("label")))
    assert ((scores > 0) & (scores < 1)).all()


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


@pytest.mark.parametrize(
    ("name", "expected_auc", "expected_uauc", "expected_loss"),
    [
        ("item mean", 0.690, 0.688, 0.635),
        ("item mean + user mean", 0.736, 0.688, 0.600),
        ("LightGBM", 0.745, 0.687, 0.593),
    ],
)
def test_baselines_reach_their_known_quality_on_movielens(
    name: str, expected_auc: float, expected_uauc: float, expected_loss: float
) -> None:
    train, items, rows = read_movielens()
    scores = BASELINES[name](train, items, rows)
    assert auc(rows["label"], scores) == pytest.approx(expected_auc, abs=0.004)
    assert uauc(rows["label"], scores, rows["user_id"]) == pytest.approx(expected_uauc, abs=0.008)
    assert log_loss(rows["label"], scores) == pytest.approx(expected_loss, abs=0.004)


def test_lightgbm_gives_the_same_scores_twice() -> None:
    train, rows = draw_rows(400), draw_rows(40, start=1000, seed=1)
    first, second = (BASELINES["LightGBM"](train, ITEMS, rows) for _ in range(2))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) > 1


def test_a_missing_lightgbm_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingDependencyError, match=r"rankonce\[eval\]"):
        BASELINES["LightGBM"](draw_rows(40), ITEMS, draw_rows(4, start=100))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (draw_rows(40).with_columns(timestamp=pl.lit(7)), "timestamp: train rows should have at"),
        (draw_rows(40).drop("label"), "label: should be a column"),
    ],
)
@pytest.mark.parametrize("name", BASELINES)
def test_train_rows_that_cannot_be_used_are_refused_by_name(
    name: str, rows: pl.DataFrame, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        BASELINES[name](rows, ITEMS, draw_rows(4, start=100))


def test_features_without_a_history_or_titles_are_refused_by_name() -> None:
    rows = draw_rows(40)
    with pytest.raises(DataError, match="history_ids: should be a column of lists"):
        past_features(rows, ITEMS, rows.drop("history_ids"))
    with pytest.raises(DataError, match="title: should be a text column"):
        past_features(rows, ITEMS.drop("title"), rows)


def test_evaluation_is_imported_without_torch_and_without_its_extra() -> None:
    code = (
        "import sys; from rankonce.evaluation import baselines, metrics, report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightgbm', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
