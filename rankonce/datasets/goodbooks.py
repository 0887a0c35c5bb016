"""Goodbooks-10k: six million ratings of the ten thousand books that Goodreads rates most.

    ratings.csv    user_id,book_id,rating (1-5); in the order of time, without a clock
    books.csv      book_id,goodreads_book_id,...,authors,original_publication_year,...,title,...;
                   titles and authors with commas are quoted
    book_tags.csv  goodreads_book_id,tag_id,count; what readers call their shelves (may be absent)
    tags.csv       tag_id,tag_name (may be absent)

``time`` counts rows of ratings.csv: it orders events but tells no age. A book's categories are its
most frequent shelves with the name of a genre, three at most: most shelves are "to-read" or
"owned". to_read.csv is not read: its order has no relation to that of the ratings.

Source: https://github.com/zygmuntz/goodbooks-10k. Licence: CC BY-SA 4.0. Z. Zajac, 2017.
"""

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.text_files import (
    MAYBE_NUMBER,
    MAYBE_TEXT,
    NUMBER,
    TEXT,
    WHOLE,
    check_rows,
    read_table,
)

_RAW = "https://raw.githubusercontent.com/zygmuntz/goodbooks-10k/master/"
_PARTS = ("ratings.csv", "books.csv", "book_tags.csv", "tags.csv")
_MAX_CATEGORIES = 3
# fmt: off
_GENRES = (
    "art", "biography", "business", "children", "childrens", "chick-lit", "christian", "classics",
    "comics", "cookbooks", "contemporary", "crime", "drama", "dystopian", "essays", "fantasy",
    "fiction", "graphic-novels", "historical-fiction", "history", "horror", "humor", "literature",
    "manga", "memoir", "music", "mystery", "nonfiction", "non-fiction", "paranormal",
    "philosophy", "picture-books", "plays", "poetry", "politics", "psychology", "religion",
    "romance", "science", "science-fiction", "self-help", "short-stories", "spirituality",
    "sports", "suspense", "thriller", "travel", "true-crime", "war", "western", "young-adult",
)
# fmt: on


def _convert(files: SourceFiles, tables: TableWriter) -> None:
    genres = _read_genres(files)
    columns = {
        "book_id": TEXT,
        "goodreads_book_id": TEXT,
        "authors": MAYBE_TEXT,
        "original_publication_year": MAYBE_NUMBER,
        "title": MAYBE_TEXT,
    }
    for frame in read_table(files.one("books.csv"), columns):
        names = [genres.get(book, []) for book in frame["goodreads_book_id"].to_list()]
        tables.add_items(
            frame.select(
                "title",
                item="book_id",
                brand="authors",
                year=pl.col("original_publication_year").cast(pl.Int32),
                categories=pl.Series(names, dtype=pl.List(pl.String)),
            )
        )
    path = files.one("ratings.csv")
    columns = {"user_id": TEXT, "book_id": TEXT, "rating": NUMBER}
    for frame in read_table(path, columns):
        check_rows(
            path,
            frame,
            pl.col("rating").is_in([1.0, 2.0, 3.0, 4.0, 5.0]),
            "rating should be 1 to 5 stars",
        )
        tables.add_events(
            frame.select(
                member="user_id",
                item="book_id",
                action=pl.lit("rated"),
                value="rating",
                time="line",
            )
        )


def _read_genres(files: SourceFiles) -> dict[str, list[str]]:
    if not (files.maybe("book_tags.csv") and files.maybe("tags.csv")):
        return {}
    names = pl.concat(read_table(files.one("tags.csv"), {"tag_id": TEXT, "tag_name": MAYBE_TEXT}))
    named = names.filter(pl.col("tag_name").is_in(_GENRES)).drop("line")
    columns = {"goodreads_book_id": TEXT, "tag_id": TEXT, "count": WHOLE}
    frames = [
        frame.drop("line").join(named, on="tag_id")
        for frame in read_table(files.one("book_tags.csv"), columns)
    ]
    best = (
        pl.concat(frames)
        .sort("goodreads_book_id", "count", "tag_name", descending=[False, True, False])
        .group_by("goodreads_book_id", maintain_order=True)
        .agg(pl.col("tag_name").unique(maintain_order=True).head(_MAX_CATEGORIES))
    )
    return dict(best.iter_rows())


ADAPTERS = (
    Adapter(
        name="goodbooks",
        domain="books",
        size="6,000,000 ratings, 10,000 books; 110 MB",
        licence="CC BY-SA 4.0",
        page="https://github.com/zygmuntz/goodbooks-10k",
        files=tuple(RemoteFile(name=name, addresses=(_RAW + name,)) for name in _PARTS),
        parts=_PARTS,
        tasks=("similar-item",),
        version=1,
        convert=_convert,
        clock="rows",
    ),
)
