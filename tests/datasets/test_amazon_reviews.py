"""Amazon Reviews of 2018 and 2023: JSON lines in gzip, metadata with holes."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rankonce.datasets.common_form import Dataset
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError

REVIEW_2023 = {
    "rating": 5.0,
    "title": "Such a lovely scent",
    "text": "But not overpowering.\u2028Good.",
    "images": [],
    "asin": "B00YQ6X8EO",
    "parent_asin": "P1",
    "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923,
    "helpful_vote": 0,
    "verified_purchase": True,
}
META_2023 = {
    "main_category": "All Beauty",
    "title": "Howard LC0008 Leather &amp; Wood\n Conditioner, 8&#39;",
    "average_rating": 4.8,
    "rating_number": 10,
    "features": ["Soft", ""],
    "description": [],
    "price": None,
    "store": "Howard Products",
    "categories": [],
    "parent_asin": "P1",
    "bought_together": None,
}
REVIEW_2018 = {
    "overall": 3.0,
    "vote": "2",
    "verified": False,
    "reviewTime": "01 1, 2018",
    "reviewerID": "AUI6WTTT0QZYS",
    "asin": "5120053084",
    "style": {"Size:": "Large"},
    "reviewText": "I now have 4",
    "unixReviewTime": 1514764800,
}
META_2018 = {
    "asin": "5120053084",
    "category": ["Clothing", "Shirts"],
    "title": "Shirt",
    "description": ["A <b>shirt</b>"],
    "brand": "",
    "also_buy": ["X"],
    "feature": "",
}


def write(path: Path, records: list[Any]) -> None:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


def prepare(tmp_path: Path, year: str, meta: list[Any], reviews: list[Any]) -> Dataset:
    given = tmp_path / "given"
    given.mkdir()
    names = {
        "2023": ("meta_Gift_Cards.jsonl.gz", "Gift_Cards.jsonl.gz"),
        "2018": ("meta_Gift_Cards.json.gz", "Gift_Cards_5.json.gz"),
    }[year]
    write(given / names[0], meta)
    write(given / names[1], reviews)
    adapter = find_adapter(f"amazon-{year}:Gift_Cards")
    return prepare_dataset(adapter, tmp_path / "out", given=given)


def test_2023_has_milliseconds_parents_and_html_in_titles(tmp_path: Path) -> None:
    other = {**REVIEW_2023, "parent_asin": "P2", "verified_purchase": False, "timestamp": 999}
    nameless = {**META_2023, "parent_asin": "P3", "title": None, "main_category": None}
    again = {**META_2023, "title": "Another name of the same"}
    dataset = prepare(
        tmp_path,
        "2023",
        [META_2023, nameless, again],
        [REVIEW_2023, other, REVIEW_2023],
    )
    items = dataset.read("items").select("item", "title", "text", "categories", "brand").collect()
    assert items.rows() == [
        (
            "P1",
            "Howard LC0008 Leather & Wood Conditioner, 8'",
            "Soft",
            ["All Beauty"],
            "Howard Products",
        ),
        ("P3", None, "Soft", [], "Howard Products"),
    ]
    events = dataset.read("events").select("item", "action", "value", "time").collect()
    assert events.rows() == [("P2", "reviewed", 5.0, 0), ("P1", "bought", 5.0, 1588687728)]
    assert dataset.manifest["dropped"] == {"repeated events": 1, "repeated items": 1}
    assert dataset.manifest["events_of_unknown_items"] == 1


def test_2018_has_seconds_texts_for_lists_and_scripts_for_titles(tmp_path: Path) -> None:
    script = {**META_2018, "asin": "S", "title": "var aPageStart = (new Date()).getTime();"}
    dataset = prepare(tmp_path, "2018", [META_2018, script], [REVIEW_2018])
    items = dataset.read("items").select("item", "title", "text", "categories", "brand").collect()
    assert items.rows() == [
        ("5120053084", "Shirt", "A <b>shirt</b>", ["Clothing", "Shirts"], None),
        ("S", None, "A <b>shirt</b>", ["Clothing", "Shirts"], None),
    ]
    assert dataset.read("events").select("action", "value", "time").collect().rows() == [
        ("reviewed", 3.0, 1514764800)
    ]


@pytest.mark.parametrize(
    ("review", "message"),
    [
        ({**REVIEW_2023, "rating": 0}, r"line 2: rating: should be 1 to 5 stars, is 0"),
        ({**REVIEW_2023, "timestamp": "1"}, r"line 2: timestamp: should be a whole number"),
        ({**REVIEW_2023, "user_id": ""}, r"line 2: user_id: should be text, is ''"),
        ({**REVIEW_2023, "parent_asin": None}, r"line 2: parent_asin: should be text, is missing"),
        ('{"rating": 5.0, ', r"Gift_Cards\.jsonl\.gz: line 2: is not JSON"),
    ],
)
def test_a_broken_review_is_named(tmp_path: Path, review: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, "2023", [META_2023], [REVIEW_2023, review])


def test_a_category_is_checked() -> None:
    with pytest.raises(DataError, match=r"category: should be one of All_Beauty, .* is 'Cars'"):
        find_adapter("amazon-2023:Cars")
    with pytest.raises(DataError, match="dataset: should be one of ml-100k"):
        find_adapter("amazon-2014:Books")
