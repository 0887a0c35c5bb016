"""ESCI: Amazon's shopping queries with products, judged by people, in English, Spanish, Japanese.

    shopping_queries_dataset_examples.parquet  example_id, query, query_id, product_id,
        product_locale (us, es, jp), esci_label (E, S, C, I), small_version and large_version (0
        or 1), split (train, test)
    shopping_queries_dataset_products.parquet  product_id, product_title, product_description,
        product_bullet_point, product_brand, product_color, product_locale

A product id names other products in other locales, so an item's id is ``us/B000...``. Its text is
the description and then the bullet points. Grades: exact 4, substitute 2, complement 1, irrelevant
0. ``esci-small`` takes the harder queries of task 1 alone, the ranking task.

Source: https://github.com/amazon-science/esci-data. Licence: Apache-2.0. C. K. Reddy et al.,
"Shopping Queries Dataset: A Large-Scale ESCI Benchmark for Improving Product Search", 2022.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.errors import DataError

_RAW = "https://github.com/amazon-science/esci-data/raw/main/shopping_queries_dataset/"
_EXAMPLES = "shopping_queries_dataset_examples.parquet"
_PRODUCTS = "shopping_queries_dataset_products.parquet"
_ROWS_PER_BATCH = 50_000
GRADES = {"E": 4, "S": 2, "C": 1, "I": 0}


def _convert_large(files: SourceFiles, tables: TableWriter) -> None:
    _convert(files, tables, "large_version")


def _convert_small(files: SourceFiles, tables: TableWriter) -> None:
    _convert(files, tables, "small_version")


def _convert(files: SourceFiles, tables: TableWriter, version: str) -> None:
    path = files.one(_EXAMPLES)
    columns = (
        "query",
        "query_id",
        "product_id",
        "product_locale",
        "esci_label",
        version,
        "split",
    )
    wanted: set[str] = set()
    for frame in _read_batches(path, columns):
        _check(path, frame, pl.col("query").is_not_null(), "query should be text")
        right = pl.col("esci_label").is_in(list(GRADES))
        _check(path, frame, right, "esci_label should be E, S, C or I")
        chosen = frame.filter(pl.col(version) == 1)
        tables.drop("rows of the other version", frame.height - chosen.height)
        judged = chosen.select(
            "split",
            query=pl.col("query_id").cast(pl.String),
            item=_ITEM,
            grade=pl.col("esci_label").replace_strict(GRADES, return_dtype=pl.Int8),
            label="esci_label",
        )
        wanted.update(judged["item"].unique().to_list())
        tables.add_judgements(judged)
        tables.add_queries(
            chosen.select(
                query=pl.col("query_id").cast(pl.String), text="query", locale="product_locale"
            ).unique("query", maintain_order=True)
        )
    path = files.one(_PRODUCTS)
    product_columns = (
        "product_id",
        "product_title",
        "product_description",
        "product_bullet_point",
        "product_brand",
        "product_locale",
    )
    for frame in _read_batches(path, product_columns):
        _check(path, frame, pl.col("product_id").is_not_null(), "product_id should be text")
        text = pl.concat_str(
            "product_description", "product_bullet_point", separator=" ", ignore_nulls=True
        )
        items = frame.select(
            item=_ITEM,
            title="product_title",
            text=pl.when(text != "").then(text),
            brand="product_brand",
            categories=pl.lit([], dtype=pl.List(pl.String)),
        )
        tables.add_items(items.filter([item in wanted for item in items["item"].to_list()]))


_ITEM = pl.col("product_locale") + "/" + pl.col("product_id")


def _read_batches(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    start = 1
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise DataError(f"{path}: should have the columns {', '.join(missing)}")
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=list(columns)):
                frame = pl.DataFrame(pl.from_arrow(batch))
                texts = [name for name in columns if frame.schema[name] == pl.String]
                yield frame.with_columns(
                    pl.col(texts).str.strip_chars(),
                    row=pl.int_range(start, start + frame.height, eager=True),
                )
                start += frame.height
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: row {start}: cannot be read as Parquet: {error}") from error


def _check(path: Path, frame: pl.DataFrame, is_right: pl.Expr, should: str) -> None:
    wrong = frame.filter(~is_right.fill_null(False)).head(1)
    if wrong.height:
        row = wrong.row(0, named=True)
        raise DataError(f"{path}: row {row.pop('row')}: {should}, is {row}")


# The repository stores both in Git LFS, whose pointers give their SHA-256.
_FILES = (
    RemoteFile(
        name=_EXAMPLES,
        addresses=(_RAW + _EXAMPLES,),
        checksum="sha256:4a735b693b4a424a6fc67f5be6e4c811495c488bbf66d02a602d308b2744263a",
    ),
    RemoteFile(
        name=_PRODUCTS,
        addresses=(_RAW + _PRODUCTS,),
        checksum="sha256:25124442d064d64b26f74082d6fa09438d679efc0c183cf28d19064a2b65a265",
    ),
)
ADAPTERS = tuple(
    Adapter(
        name=name,
        domain="product search",
        size=size,
        licence="Apache-2.0",
        page="https://github.com/amazon-science/esci-data",
        files=_FILES,
        parts=(_EXAMPLES, _PRODUCTS),
        tasks=("search-relevance",),
        version=1,
        convert=convert,
    )
    for name, size, convert in (
        ("esci", "2,621,288 judgements of 130,652 queries, 1.8 M products; 1.2 GB", _convert_large),
        ("esci-small", "1,118,011 judgements of 48,300 queries; 1.2 GB", _convert_small),
    )
)
