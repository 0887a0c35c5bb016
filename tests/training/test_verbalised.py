"""Items and histories of tables become documents, and files are known by their columns."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankonce.errors import DataError
from rankonce.training.corpora import open_corpora
from rankonce.training.documents import mix_corpora

ITEMS = pl.DataFrame(
    {
        "item": ["i1", "i2", "i3"],
        "title": ["Lamp", "Chair", None],
        "text": ["It  shines.", None, "Nameless."],
        "categories": [["Home", "Light"], [], None],
        "brand": ["Acme", None, None],
        "year": [1999, None, 2001],
    },
    schema_overrides={"year": pl.Int32, "categories": pl.List(pl.String)},
)
EVENTS = pl.DataFrame(
    {
        "member": ["a", "a", "a", "a", "b", "b", "c"],
        "item": ["i1", "i2", "i3", "i1", "i1", "i2", "i9"],
        "action": ["rated", "rated", "rated", "clicked", "rated", "shown", "rated"],
        "value": [4.0, 3.5, 5.0, 1.0, 2.0, 0.0, 5.0],
        "time": [None, 5, 6, 7, 1, 9, 3],
    }
)
FILMS = pl.DataFrame(
    {
        "item_id": [1, 2],
        "title": ["Heat (1995)", "Up (2009)"],
        "genres": ["Crime|Thriller", "(no genres listed)"],
    }
)
RATINGS = pl.DataFrame(
    {
        "user_id": [7, 8, 7],
        "item_id": [1, 1, 2],
        "rating": [4.5, 5.0, 2.0],
        "timestamp": [20, 10, 10],
    }
)


def write(folder: Path, **tables: pl.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    return folder


def texts(path: Path, *, seed: int = 0, **options: Any) -> list[str]:
    return [one.text for one in mix_corpora(open_corpora(path, **options), seed=seed)]


def in_all_styles(path: Path, **options: Any) -> set[str]:
    return {text for seed in range(40) for text in texts(path, seed=seed, **options)}


def test_a_folder_of_the_common_form_gives_items_with_counts_and_histories(tmp_path: Path) -> None:
    found = in_all_styles(write(tmp_path / "set", items=ITEMS, events=EVENTS))
    # Of i1's raters one liked it and one did not; 3.5 of i2 says neither; a click is no rating.
    assert (
        "Lamp is listed in the catalogue. It belongs to Home, Light. It comes from Acme. "
        "Its year is 1999. It was liked by 50 % of 2 raters. It shines."
    ) in found
    assert "Item: Chair" in found
    assert (
        "History of a member, oldest first:\nliked: Lamp · Home, Light · 4 of 5\n"
        "rated: Chair · 3.5 of 5\nclicked: Lamp · Home, Light"
    ) in found
    assert (
        "A member disliked Lamp (Home, Light) with 2 of 5 stars, then passed over Chair."
    ) in found
    # i3 has no title, and nothing is known of i9: 2 items and 2 histories in 4 styles each.
    assert len(found) == 16


def test_a_folder_of_films_gives_films_with_counts_and_histories_by_time(tmp_path: Path) -> None:
    found = in_all_styles(write(tmp_path / "set", items=FILMS, ratings=RATINGS))
    assert "Film: Heat (1995) · Crime, Thriller · liked by 100 % of 2 raters" in found
    assert "Up (2009) is a film. It was liked by 0 % of 1 raters." in found
    assert (
        "A member disliked Up (2009) with 2 of 5 stars, "
        "then liked Heat (1995) (Crime, Thriller) with 4.5 of 5 stars."
    ) in found
    assert len(found) == 16


def test_labels_stand_in_for_ratings_and_train_rows_alone_are_read(tmp_path: Path) -> None:
    rows = RATINGS.select("user_id", "item_id", "timestamp", label=pl.Series([1, 0, 0]))
    folder = write(tmp_path / "set", items=FILMS, train=rows, valid=rows, ratings=RATINGS)
    found = in_all_styles(folder)
    assert "Film: Heat (1995) · Crime, Thriller · liked by 50 % of 2 raters" in found
    assert "A member disliked Up (2009), then liked Heat (1995) (Crime, Thriller)." in found
    assert len(found) == 16


def test_nothing_from_the_end_on_is_counted_or_told(tmp_path: Path) -> None:
    films = in_all_styles(write(tmp_path / "films", items=FILMS, ratings=RATINGS), until=20)
    assert "Film: Heat (1995) · Crime, Thriller · liked by 100 % of 1 raters" in films
    assert "A member disliked Up (2009) with 2 of 5 stars." in films
    common = in_all_styles(write(tmp_path / "common", items=ITEMS, events=EVENTS), until=5)
    assert "History of a member, oldest first:\nliked: Lamp · Home, Light · 4 of 5" in common
    assert not any("Chair · 3.5" in text for text in common)


def test_styles_differ_between_epochs_and_not_between_readings(tmp_path: Path) -> None:
    many = pl.DataFrame(
        {"item_id": range(50), "title": [f"Film {n}" for n in range(50)], "genres": ["Drama"] * 50}
    )
    path = write(tmp_path / "set", items=many) / "items.parquet"
    assert texts(path, seed=1) == texts(path, seed=1)
    assert texts(path, seed=1) != texts(path, seed=2)
    assert sum(text.startswith("Film: ") for text in texts(path, seed=1)) in range(5, 22)


@pytest.mark.parametrize(
    ("tables", "name", "description"),
    [
        (
            {"items": ITEMS},
            "items.parquet",
            "items, 3 rows (1 without a title left out), without counts",
        ),
        ({"items": FILMS}, "items.parquet", "films, 2 rows, without counts"),
        (
            {"items": ITEMS, "events": EVENTS},
            "events.parquet",
            "histories of members, 7 rows (2 with a null or without a titled item left out), with",
        ),
        ({"items": FILMS, "mine": RATINGS}, "mine.parquet", "histories of members, 3 rows, with"),
        (
            {
                "items": FILMS.with_columns(pl.col("item_id").cast(pl.Int32)),
                "mine": RATINGS.with_columns(rating=pl.Series([None, 5.0, 2.0])),
            },
            "mine.parquet",
            "histories of members, 3 rows (1 with a null or without a titled item left out), with",
        ),
        ({"notes": pl.DataFrame({"text": ["a"]})}, "notes.parquet", "the column text"),
    ],
)
def test_a_file_is_known_by_its_columns(
    tmp_path: Path, tables: dict[str, pl.DataFrame], name: str, description: str
) -> None:
    (found,) = open_corpora(write(tmp_path / "set", **tables) / name)
    assert found.description.startswith(description)


def test_a_folder_of_texts_is_read_file_by_file(tmp_path: Path) -> None:
    write(tmp_path, b=pl.DataFrame({"text": ["two"]}))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "README.md").write_text("not read")
    assert texts(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("tables", "name", "fault"),
    [
        ({"t": pl.DataFrame({"x": [1], "y": [2]})}, "t.parquet", r"t\.parquet: columns: should be"),
        ({"t": pl.DataFrame({"text": [1]})}, "t.parquet", "are text"),
        ({"ratings": RATINGS}, "ratings.parquet", "need the titles of items.parquet"),
        (
            {"items": ITEMS, "ratings": RATINGS},
            "ratings.parquet",
            r"should have the columns action, item, member, time, value, as items\.parquet is of i",
        ),
        (
            {"items": FILMS, "ratings": RATINGS.drop("rating")},
            "ratings.parquet",
            "should have a column rating or label",
        ),
        ({"items": ITEMS}, "none.parquet", "there is no such file"),
        ({}, "", "should hold files that end in .txt"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, tables: dict[str, pl.DataFrame], name: str, fault: str
) -> None:
    with pytest.raises(DataError, match=fault):
        open_corpora(write(tmp_path / "set", **tables) / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name, fault in (("a.parquet", "is not a Parquet file"), ("a.csv", "should end in .txt")):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=fault):
            open_corpora(tmp_path / name)
    with pytest.raises(DataError, match="should weigh more than 0 and be finite, weighs 0"):
        open_corpora(tmp_path, weight=0)


def test_events_out_of_order_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", items=ITEMS, events=EVENTS.reverse())
    with pytest.raises(DataError, match="member b: rows should be in the order of time"):
        texts(folder)
