"""Trees as teacher: what they learn from, films that nobody rated, members who are hidden."""

from pathlib import Path

import numpy as np
import polars as pl

from rankonce.datasets.movielens import movie_examples, movie_rows, read_rows
from rankonce.evaluation.metrics import auc, log_loss
from rankonce.training.catalogue import Catalogue
from rankonce.training.teacher import add_unrated, fit_teacher, hide_members
from tests.conftest import data_folder
from tests.datasets.test_movie_columns import ITEMS, draw_rows


def planted(num_rows: int, *, seed: int) -> tuple[pl.DataFrame, dict[int, float]]:
    """Rows in which the film alone decides, with shares that no column of the rows tells early."""
    random = np.random.default_rng(seed)
    quality = {film: float(share) for film, share in enumerate(np.linspace(0.1, 0.9, 8))}
    rows = draw_rows(num_rows, seed=seed)
    likes = [int(random.random() < quality[film]) for film in rows["item_id"].to_list()]
    return rows.with_columns(label=pl.Series(likes)), quality


def test_the_teacher_finds_what_decides_and_reads_no_label_of_the_rows() -> None:
    rows, quality = planted(4000, seed=1)
    teach = fit_teacher(rows, ITEMS, since=0)
    asked = draw_rows(400, start=10_000, seed=2)
    shares = teach(asked)
    truth = np.array([quality[film] for film in asked["item_id"].to_list()])
    assert np.corrcoef(shares, truth)[0, 1] > 0.97
    assert np.array_equal(shares, teach(asked.drop("label")))


def test_another_catalogue_tells_the_teacher_of_films_that_nobody_rated() -> None:
    rows, quality = planted(3000, seed=3)
    items = pl.concat(
        [ITEMS, pl.DataFrame({"item_id": [8, 9], "title": ["New", "Old"], "genres": ["", ""]})]
    )
    titles = dict(zip(ITEMS["item_id"].to_list(), ITEMS["title"].to_list(), strict=True))
    catalogue = Catalogue(
        films={film: {"title": title} for film, title in {**titles, 8: "New", 9: "Old"}.items()},
        like_shares={**quality, 8: 0.9, 9: 0.1},
        num_raters=dict.fromkeys(range(10), 50),
    )
    asked = draw_rows(2, start=10_000).with_columns(item_id=pl.Series([8, 9], dtype=pl.Int64))
    with_it = fit_teacher(rows, items, since=0, catalogue=catalogue)(asked)
    without = fit_teacher(rows, items, since=0)(asked)
    assert with_it[0] > with_it[1] + 0.1
    assert abs(without[0] - without[1]) < 0.1


def test_unrated_films_are_new_to_the_member_and_have_no_label() -> None:
    rows = draw_rows(60).with_columns(user_id=pl.int_range(60) % 30)
    both = add_unrated(rows, per_row=2, seed=5)
    assert both.head(60).equals(rows.select(both.columns))
    added = both.tail(-60)
    assert 30 < added.height < 120
    assert added["label"].null_count() == added.height
    assert added.join(rows, on=["user_id", "item_id"], how="semi").height == 0
    assert not any(film in past for film, past in added.select("item_id", "history_ids").rows())
    moments = rows.select("user_id", "timestamp").unique()
    assert added.join(moments, on=["user_id", "timestamp"], how="anti").height == 0
    assert both.equals(add_unrated(rows, per_row=2, seed=5))
    assert not both.equals(add_unrated(rows, per_row=2, seed=6))


def test_of_a_hidden_member_only_the_history_is_said() -> None:
    rows = draw_rows(80)
    hidden = hide_members(rows, share=0.5, seed=1)
    is_hidden = (hidden["user_id"] < 0).to_numpy()
    assert set(rows.filter(pl.Series(is_hidden))["user_id"].to_list()).isdisjoint(
        rows.filter(pl.Series(~is_hidden))["user_id"].to_list()
    )
    assert 0 < is_hidden.mean() < 1
    movies = movie_rows(hidden, ITEMS, train=rows)
    assert (movies.numbers["num_ratings"][is_hidden] == 0).all()
    assert np.isnan(movies.numbers["genre_like_share"][is_hidden]).all()
    assert movies.numbers["num_ratings"][~is_hidden].max() > 0
    for example in movie_examples(movies, candidates_per_example=9, seed=3):
        first = int(str(example.request.candidates[0].id))
        if is_hidden[first]:
            assert example.request.profile["num_ratings"] == 0
            assert "like_share" not in example.request.profile
    assert hide_members(rows, share=0.0, seed=1).equals(rows)


def test_the_teacher_beats_the_averages_on_real_later_rows() -> None:
    folder = data_folder("ml1m")
    train, items = (read_rows(Path(folder) / f"{name}.parquet") for name in ("train", "items"))
    cut = float(np.quantile(train["timestamp"].to_numpy(), 0.66))
    early, late = train.filter(pl.col("timestamp") < cut), train.filter(pl.col("timestamp") >= cut)
    start = float(np.quantile(early["timestamp"].to_numpy(), 0.3))
    shares = fit_teacher(early, items, since=start)(late)
    expected = movie_rows(late, items, train=early).numbers["expected_like_share"]
    labels = late["label"].to_numpy()
    assert auc(labels, shares) > auc(labels, expected) + 0.01
    assert log_loss(labels, shares) < log_loss(labels, expected) - 0.01
