"""What another catalogue knows of films: shares free of who rated, labels, films found by title."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rankonce.datasets.ml_small import film_like_shares, leave_out_members
from rankonce.errors import DataError
from rankonce.training.catalogue import (
    Catalogue,
    quality_examples,
    read_catalogue,
    repeated_quality_examples,
)


def planted_rows(num_members: int = 400, num_films: int = 30) -> tuple[pl.DataFrame, np.ndarray]:
    """Rows in which strict members rate the better films: plain shares would be wrong."""
    random = np.random.default_rng(0)
    quality = np.linspace(-1.5, 1.5, num_films)
    rows = []
    for member in range(num_members):
        mood = random.choice([-1.0, 1.0])
        # Members who like little have met the better half far more often.
        weights = np.exp(-0.7 * mood * quality)
        films = random.choice(num_films, size=15, replace=False, p=weights / weights.sum())
        for film in films.tolist():
            like = random.random() < 1 / (1 + np.exp(-quality[film] - mood))
            rows.append((member, film, int(like), member * 100))
    columns = dict.fromkeys(("user_id", "item_id", "label", "timestamp"), pl.Int64)
    return pl.DataFrame(rows, schema=columns, orient="row"), quality


def test_shares_are_free_of_who_rated_the_film() -> None:
    rows, quality = planted_rows()
    shares = film_like_shares(rows).sort("item_id")
    plain = rows.group_by("item_id").agg(pl.mean("label")).sort("item_id")["label"].to_numpy()
    found = np.corrcoef(shares["like_share"].to_numpy(), quality)[0, 1]
    assert found > 0.9
    assert 1 - found < 0.6 * (1 - np.corrcoef(plain, quality)[0, 1])
    assert shares["num_raters"].sum() == rows.height
    elsewhere = film_like_shares(rows, mean=0.3).sort("item_id")
    shift = shares["like_share"] - elsewhere["like_share"]
    assert shift.to_numpy()[5:-5] == pytest.approx(rows["label"].mean() - 0.3)


def test_members_of_a_time_are_left_out_whole() -> None:
    rows, _ = planted_rows(num_members=5)
    kept = leave_out_members(rows, since=100, until=300)
    assert set(kept["user_id"].to_list()) == {0, 3, 4}


def build_catalogue() -> Catalogue:
    return Catalogue(
        films={
            1: {"title": "Heat (1995)", "genres": ["Crime"]},
            2: {"title": "Up (2009)"},
            3: {"title": "M (1931)"},
        },
        like_shares={1: 0.8, 2: 0.25, 3: 0.5},
        num_raters={1: 200, 2: 4, 3: 9},
    )


def test_every_film_is_asked_of_once_with_nothing_but_its_words() -> None:
    examples = list(quality_examples(build_catalogue(), candidates_per_example=2, seed=1))
    asked = {
        str(candidate.fields["title"]): label
        for example in examples
        for candidate, label in zip(example.request.candidates, example.labels, strict=True)
    }
    assert asked == {
        "Heat (1995)": {"Yes": 0.8, "No": pytest.approx(0.2)},
        "Up (2009)": {"Yes": 0.25, "No": 0.75},
        "M (1931)": {"Yes": 0.5, "No": 0.5},
    }
    assert all(not example.request.history for example in examples)
    repeated = list(
        repeated_quality_examples(build_catalogue(), candidates_per_example=2, seed=1, times=5)
    )
    orders = [tuple(c.id for e in repeated[i : i + 2] for c in e.request.candidates)
              for i in range(0, 10, 2)]  # fmt: skip
    assert len(set(orders)) > 1
    assert all(sorted(order, key=str) == ["1", "2", "3"] for order in orders)


def test_films_are_found_by_their_titles() -> None:
    films = {7: {"title": "Heat (1995)"}, 8: {"title": "Alien (1979)"}}
    assert build_catalogue().find(films) == {7: (0.8, 200.0)}


def test_a_catalogue_without_its_columns_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [1]}).write_parquet(
        tmp_path / "ratings.parquet"
    )
    with pytest.raises(DataError, match=r"has no items\.parquet; or be made by"):
        read_catalogue(tmp_path, since=0, until=1, mean=0.5)
    pl.DataFrame({"item_id": [1]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="ratings: should have the columns rating"):
        read_catalogue(tmp_path, since=0, until=1, mean=0.5)
