"""WANDS: Wayfair's search queries with products, judged by people.

    query.csv    query_id, query, query_class (may be empty)
    product.csv  product_id, product_name, product_class, category hierarchy ("A / B / C"),
                 product_description, product_features ("colour:red|..."), rating_count,
                 average_rating, review_count
    label.csv    id, query_id, product_id, label (Exact, Partial or Irrelevant)

All are separated by tabs in spite of their names; a field with a quote in it is quoted and the
quote doubled. The product's text is its description and then its features. Grades: Exact 4,
Partial 2, Irrelevant 0.

Source: https://github.com/wayfair/WANDS. Licence: MIT. Y. Chen et al., "WANDS: Dataset for Product
Search Relevance Assessment", ECIR 2022.
"""

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.text_files import MAYBE_TEXT, TEXT, check_rows, read_table

_RAW = "https://raw.githubusercontent.com/wayfair/WANDS/main/dataset/"
_PARTS = ("query.csv", "product.csv", "label.csv")
GRADES = {"Exact": 4, "Partial": 2, "Irrelevant": 0}


def _convert(files: SourceFiles, tables: TableWriter) -> None:
    columns = {"query_id": TEXT, "query": TEXT, "query_class": MAYBE_TEXT}
    for frame in read_table(files.one("query.csv"), columns, separator="\t"):
        tables.add_queries(frame.select(query="query_id", text="query", category="query_class"))
    columns = {
        "product_id": TEXT,
        "product_name": MAYBE_TEXT,
        "category hierarchy": MAYBE_TEXT,
        "product_description": MAYBE_TEXT,
        "product_features": MAYBE_TEXT,
    }
    for frame in read_table(files.one("product.csv"), columns, separator="\t"):
        hierarchy = pl.col("category hierarchy").fill_null("").str.split("/")
        names = hierarchy.list.eval(pl.element().str.strip_chars())
        tables.add_items(
            frame.select(
                item="product_id",
                title="product_name",
                text=_join("product_description", "product_features"),
                categories=names.list.eval(pl.element().filter(pl.element() != "")),
            )
        )
    path = files.one("label.csv")
    columns = {"query_id": TEXT, "product_id": TEXT, "label": TEXT}
    for frame in read_table(path, columns, separator="\t"):
        right = pl.col("label").is_in(list(GRADES))
        check_rows(path, frame, right, f"label should be {', '.join(GRADES)}")
        tables.add_judgements(
            frame.select(
                "label",
                query="query_id",
                item="product_id",
                grade=pl.col("label").replace_strict(GRADES, return_dtype=pl.Int8),
            )
        )


def _join(first: str, second: str) -> pl.Expr:
    text = pl.concat_str(first, second, separator=" ", ignore_nulls=True)
    return pl.when(text != "").then(text)


ADAPTERS = (
    Adapter(
        name="wands",
        domain="product search",
        size="233,448 judgements of 480 queries, 42,994 products; 75 MB",
        licence="MIT",
        page="https://github.com/wayfair/WANDS",
        files=tuple(RemoteFile(name=name, addresses=(_RAW + name,)) for name in _PARTS),
        parts=_PARTS,
        tasks=("search-relevance",),
        version=1,
        convert=_convert,
    ),
)
