"""Goodbooks-10k: quoted titles, books without a year, rows that count as a clock."""

from pathlib import Path

import pytest

from rankonce.datasets.common_form import Dataset
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError

BOOKS = (
    "book_id,goodreads_book_id,best_book_id,authors,original_publication_year,title,isbn\n"
    '1,2767052,2767052,Suzanne Collins,2008.0,"The Hunger Games (The Hunger Games, #1)",439023483\n'
    '2,3,3,"J.K. Rowling, Mary GrandPré",1997.0,"Harry Potter, 1",043965548X\n'
    "3,9,9,Homer,-750.0,The Iliad,\n"
    "4,10,10,Nobody,,Undated,\n"
)
RATINGS = "user_id,book_id,rating\n7,2,5\n7,1,4\n8,3,1\n7,2,5\n8,4,5\n"
TAGS = "tag_id,tag_name\n1,to-read\n2,fantasy\n3,young-adult\n4,magic\n5,classics\n6,fiction\n7,\n"
BOOK_TAGS = (
    "goodreads_book_id,tag_id,count\n3,1,900\n3,2,50\n3,3,70\n3,5,2\n3,6,60\n9,5,10\n10,4,3\n"
)
FILES = {"books.csv": BOOKS, "ratings.csv": RATINGS, "tags.csv": TAGS, "book_tags.csv": BOOK_TAGS}


def prepare(tmp_path: Path, files: dict[str, str]) -> Dataset:
    given = tmp_path / "given"
    given.mkdir()
    for name, content in files.items():
        (given / name).write_text(content, encoding="utf-8")
    return prepare_dataset(find_adapter("goodbooks"), tmp_path / "out", given=given)


def test_books_have_authors_years_and_genres_from_shelves(tmp_path: Path) -> None:
    items = prepare(tmp_path, FILES).read("items").collect()
    assert items.select("item", "title", "brand", "year", "categories").rows() == [
        ("1", "The Hunger Games (The Hunger Games, #1)", "Suzanne Collins", 2008, []),
        (
            "2",
            "Harry Potter, 1",
            "J.K. Rowling, Mary GrandPré",
            1997,
            ["young-adult", "fiction", "fantasy"],
        ),
        ("3", "The Iliad", "Homer", -750, ["classics"]),
        ("4", "Undated", "Nobody", None, []),
    ]


def test_time_counts_rows_and_a_rating_given_twice_counts_once(tmp_path: Path) -> None:
    dataset = prepare(tmp_path, {"books.csv": BOOKS, "ratings.csv": RATINGS})
    events = dataset.read("events").sort("time").collect()
    assert events.select("member", "item", "value", "time").rows() == [
        ("7", "2", 5.0, 2),
        ("7", "1", 4.0, 3),
        ("8", "3", 1.0, 4),
        ("8", "4", 5.0, 6),
    ]
    assert dataset.manifest["clock"] == "rows"
    assert dataset.manifest["dropped"] == {"repeated events": 1}


def test_a_broken_rating_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings\.csv: line 7: rating should be 1 to 5 stars"):
        prepare(tmp_path, {"books.csv": BOOKS, "ratings.csv": RATINGS + "1,1,0\n"})
