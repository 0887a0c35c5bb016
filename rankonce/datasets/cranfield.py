"""Cranfield: 1,400 abstracts on aerodynamics and questions of their authors, in five grades.

    docs.parquet     doc_id, title, author, text (begins with the title)
    queries.parquet  query_id, query
    qrels.parquet    query_id, doc_id, grade (4 = complete answer ... 0 = judged irrelevant)

A pair that is not listed is unjudged and taken as 0. Two documents are empty; they stay items
without a title and text, and requests leave them out.

These Parquet files are made from the collection; no address serves them, so they are read from
files at hand. Source: http://ir.dcs.gla.ac.uk/resources/test_collections/cran/. Licence: none is
stated; in free use for research since 1967. C. Cleverdon, "The Cranfield tests on index language
devices", 1967.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.movielens import read_rows
from rankonce.errors import DataError


def _convert(files: SourceFiles, tables: TableWriter) -> None:
    docs = _read(files.one("docs.parquet"), ("doc_id", "title", "author", "text"))
    title, text = pl.col("title").str.strip_chars(), pl.col("text").str.strip_chars()
    rest = text.str.strip_prefix(title).str.strip_chars()
    tables.add_items(
        docs.select(
            item=pl.col("doc_id").cast(pl.String),
            title=pl.when(title != "").then(title),
            text=pl.when(rest != "").then(rest),
            categories=pl.lit([], dtype=pl.List(pl.String)),
            brand=pl.when(pl.col("author").str.strip_chars() != "").then(pl.col("author")),
        )
    )
    queries = _read(files.one("queries.parquet"), ("query_id", "query"))
    tables.add_queries(queries.select(query=pl.col("query_id").cast(pl.String), text="query"))
    path = files.one("qrels.parquet")
    judged = _read(path, ("query_id", "doc_id", "grade"))
    wrong = judged.with_row_index("row", offset=1).filter(
        ~pl.col("grade").is_in([0, 1, 2, 3, 4]).fill_null(False)
    )
    if wrong.height:
        row = wrong.row(0, named=True)
        raise DataError(f"{path}: row {row['row']}: grade should be 0 to 4, is {row['grade']}")
    tables.add_judgements(
        judged.select(
            "grade",
            query=pl.col("query_id").cast(pl.String),
            item=pl.col("doc_id").cast(pl.String),
            label=pl.col("grade").cast(pl.String),
        )
    )


def _read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    frame = read_rows(path)
    if missing := [name for name in columns if name not in frame.columns]:
        raise DataError(f"{path}: should have the columns {', '.join(missing)}")
    return frame


ADAPTERS = (
    Adapter(
        name="cranfield",
        domain="document search",
        size="1,194 judgements of 150 queries, 1,400 documents; 1 MB",
        licence="none stated; in free use for research",
        page="http://ir.dcs.gla.ac.uk/resources/test_collections/cran/",
        files=(),
        parts=("docs.parquet", "queries.parquet", "qrels.parquet"),
        tasks=("search-relevance",),
        version=1,
        convert=_convert,
    ),
)
