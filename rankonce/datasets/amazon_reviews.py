"""Amazon Reviews of 2018 and of 2023, one category at a time.

    2023  CATEGORY.jsonl.gz       user_id, parent_asin, asin, rating, timestamp (ms),
                                  verified_purchase, title, text, helpful_vote, images
          meta_CATEGORY.jsonl.gz  parent_asin, title, description and features (lists), categories,
                                  main_category, store, price, ...
    2018  CATEGORY_5.json.gz      reviewerID, asin, overall, unixReviewTime (s), verified,
                                  reviewText, ... (members and products with five reviews or more)
          meta_CATEGORY.json.gz   asin, title, description (a list), category (a list), brand, ...

A review is an event: "bought" where the purchase is verified, else "reviewed", with the stars as
its value; its text is not kept. In 2023 the item is the ``parent_asin``, which colours and sizes
share. Titles are HTML: entities are resolved, and a title that is a piece of script ("getTime") is
none. Reviews of products without metadata, or without a title, stay in events; requests leave them
out. Reviews that the files hold twice count once.

Source: https://amazon-reviews-2023.github.io and https://nijianmo.github.io/amazon. Licence: none
is stated; for research, with citation. Y. Hou et al., "Bridging Language and Items for Retrieval
and Recommendation", 2024; J. Ni, J. Li, J. McAuley, "Justifying Recommendations using
Distantly-Labeled Reviews and Fine-Grained Aspects", EMNLP 2019.
"""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.text_files import read_json_lines
from rankonce.errors import DataError

_HOST = "https://mcauleylab.ucsd.edu/public_datasets/data/"
_LICENCE = "none stated; for research, with citation"
_MISSING = object()
# fmt: off
CATEGORIES: dict[str, tuple[str, ...]] = {
    "2023": (
        "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive",
        "Baby_Products", "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl",
        "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music",
        "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Handmade_Products",
        "Health_and_Household", "Health_and_Personal_Care", "Home_and_Kitchen",
        "Industrial_and_Scientific", "Kindle_Store", "Magazine_Subscriptions", "Movies_and_TV",
        "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
        "Software", "Sports_and_Outdoors", "Subscription_Boxes", "Tools_and_Home_Improvement",
        "Toys_and_Games", "Unknown", "Video_Games",
    ),
    "2018": (
        "AMAZON_FASHION", "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Automotive",
        "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry",
        "Digital_Music", "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food",
        "Home_and_Kitchen", "Industrial_and_Scientific", "Kindle_Store", "Luxury_Beauty",
        "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments", "Office_Products",
        "Patio_Lawn_and_Garden", "Pet_Supplies", "Prime_Pantry", "Software",
        "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games",
    ),
}
# fmt: on


def _convert_2023(files: SourceFiles, tables: TableWriter) -> None:
    meta, reviews = _meta_and_reviews(files, ".jsonl")
    for batch in read_json_lines(meta):
        rows = [
            {
                "item": _text(meta, line, record, "parent_asin"),
                "title": _clean_title(record.get("title")),
                "text": _join(record.get("features"), record.get("description")),
                "categories": _texts(record.get("categories"))
                or _texts([record.get("main_category")]),
                "brand": _text_or_none(record.get("store")),
            }
            for line, record in batch
        ]
        tables.add_items(pl.DataFrame(rows, schema=_ITEM_SCHEMA))
    for batch in read_json_lines(reviews):
        events = [
            {
                "member": _text(reviews, line, record, "user_id"),
                "item": _text(reviews, line, record, "parent_asin"),
                "action": "bought" if record.get("verified_purchase") else "reviewed",
                "value": _stars(reviews, line, record, "rating"),
                "time": _whole(reviews, line, record, "timestamp") // 1000,
            }
            for line, record in batch
        ]
        tables.add_events(pl.DataFrame(events, schema=_EVENT_SCHEMA))


def _convert_2018(files: SourceFiles, tables: TableWriter) -> None:
    meta, reviews = _meta_and_reviews(files, ".json")
    for batch in read_json_lines(meta):
        rows = [
            {
                "item": _text(meta, line, record, "asin"),
                "title": _clean_title(record.get("title")),
                "text": _join(record.get("feature"), record.get("description")),
                "categories": _texts(record.get("category")),
                "brand": _text_or_none(record.get("brand")),
            }
            for line, record in batch
        ]
        tables.add_items(pl.DataFrame(rows, schema=_ITEM_SCHEMA))
    for batch in read_json_lines(reviews):
        events = [
            {
                "member": _text(reviews, line, record, "reviewerID"),
                "item": _text(reviews, line, record, "asin"),
                "action": "bought" if record.get("verified") else "reviewed",
                "value": _stars(reviews, line, record, "overall"),
                "time": _whole(reviews, line, record, "unixReviewTime"),
            }
            for line, record in batch
        ]
        tables.add_events(pl.DataFrame(events, schema=_EVENT_SCHEMA))


_ITEM_SCHEMA: dict[str, Any] = {
    "item": pl.String,
    "title": pl.String,
    "text": pl.String,
    "categories": pl.List(pl.String),
    "brand": pl.String,
}
_EVENT_SCHEMA: dict[str, Any] = {
    "member": pl.String,
    "item": pl.String,
    "action": pl.String,
    "value": pl.Float64,
    "time": pl.Int64,
}


def _meta_and_reviews(files: SourceFiles, suffix: str) -> tuple[Path, Path]:
    metas = [path for path in files.paths if path.name.startswith("meta_")]
    reviews = [path for path in files.paths if not path.name.startswith("meta_")]
    if len(metas) != 1 or len(reviews) != 1:
        names = ", ".join(path.name for path in files.paths)
        raise DataError(
            f"should be one file CATEGORY{suffix}.gz and one meta_CATEGORY{suffix}.gz, is {names}"
        )
    return metas[0], reviews[0]


def _field(path: Path, line: int, record: Mapping[str, Any], name: str, words: str) -> Any:
    value = record.get(name, _MISSING)
    if value is _MISSING or value is None:
        raise DataError(f"{path}: line {line}: {name}: should be {words}, is missing")
    return value


def _text(path: Path, line: int, record: Mapping[str, Any], name: str) -> str:
    value = _field(path, line, record, name, "text")
    if not isinstance(value, str) or not value:
        raise DataError(f"{path}: line {line}: {name}: should be text, is {value!r}")
    return value


def _whole(path: Path, line: int, record: Mapping[str, Any], name: str) -> int:
    value = _field(path, line, record, name, "a whole number")
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{path}: line {line}: {name}: should be a whole number, is {value!r}")
    return value


def _stars(path: Path, line: int, record: Mapping[str, Any], name: str) -> float:
    value = _field(path, line, record, name, "1 to 5 stars")
    if not isinstance(value, int | float) or not 1 <= value <= 5:
        raise DataError(f"{path}: line {line}: {name}: should be 1 to 5 stars, is {value!r}")
    return float(value)


def _clean_title(value: object) -> str | None:
    title = _text_or_none(value)
    return None if title is None or "getTime" in title else title


def _text_or_none(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return " ".join(html.unescape(value).split()) or None


def _texts(value: object) -> list[str]:
    # Some records of 2018 hold "" where a list should be.
    parts = value if isinstance(value, list) else [value]
    return [text for part in parts if (text := _text_or_none(part))]


def _join(*values: object) -> str | None:
    return " ".join(text for value in values for text in _texts(value)) or None


def amazon_adapter(year: str, category: str) -> Adapter:
    """Make the adapter of one category.

    Raises:
        DataError: there is no such category.
    """
    if category not in CATEGORIES[year]:
        raise DataError(
            f"category: should be one of {', '.join(CATEGORIES[year])}, is {category!r}"
        )
    if year == "2023":
        addresses = {
            f"{category}.jsonl.gz": f"amazon_2023/raw/review_categories/{category}.jsonl.gz",
            f"meta_{category}.jsonl.gz": (
                f"amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz"
            ),
        }
    else:
        addresses = {
            f"{category}_5.json.gz": f"amazon_v2/categoryFilesSmall/{category}_5.json.gz",
            f"meta_{category}.json.gz": f"amazon_v2/metaFiles2/meta_{category}.json.gz",
        }
    # At hand there may be all reviews of 2018 instead of those of the busy members.
    names = (*addresses, *((f"{category}.json.gz",) if year == "2018" else ()))
    return Adapter(
        name=f"amazon-{year}:{category}",
        domain="products",
        size="MB to 10 GB by category",
        licence=_LICENCE,
        page={
            "2023": "https://amazon-reviews-2023.github.io",
            "2018": "https://nijianmo.github.io/amazon",
        }[year],
        files=tuple(
            RemoteFile(name=name, addresses=(_HOST + path,)) for name, path in addresses.items()
        ),
        parts=(*names, *(name.removesuffix(".gz") for name in names)),
        tasks=("similar-item",),
        version=1,
        convert={"2023": _convert_2023, "2018": _convert_2018}[year],
    )
