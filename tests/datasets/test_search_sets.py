"""WANDS, ESCI and Cranfield: judged queries as lists with grades."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankonce.datasets.candidate_lists import query_lists
from rankonce.datasets.common_form import Dataset
from rankonce.datasets.examples import make_examples
from rankonce.datasets.rating_examples import ExampleConfig
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError
from tests.conftest import data_folder

QUERY = (
    "query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n"
    '208\t"fawkes 36"" blue vanity"\tVanities\n216\tmusic\t\n'
)
PRODUCT = (
    "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\t"
    "product_features\trating_count\taverage_rating\treview_count\n"
    "0\tsolid wood bed\tBeds\tFurniture / Bedroom Furniture / Beds\tgood, deep sleep\t"
    "color:red|size:1\t15.0\t4.5\t15.0\n"
    '1\t"12"" lamp"\t\t\t"two\nlines"\t\t\t\t\n'
    "2\tchair\tChairs\tFurniture\t\tcolor:blue\t1.0\t5.0\t1.0\n"
)
LABEL = (
    "id\tquery_id\tproduct_id\tlabel\n0\t0\t2\tExact\n1\t0\t0\tIrrelevant\n2\t208\t1\tPartial\n"
    "3\t0\t2\tPartial\n4\t208\t99\tExact\n"
)
WANDS = {"query.csv": QUERY, "product.csv": PRODUCT, "label.csv": LABEL}
EXAMPLES = {
    "example_id": [0, 1, 2, 3, 4],
    "query": ["usb cable", "usb cable", "usb cable", " zapatos", "usb cable"],
    "query_id": [7, 7, 7, 9, 7],
    "product_id": ["B1", "B2", "B3", "B1", "B4"],
    "product_locale": ["us", "us", "us", "es", "us"],
    "esci_label": ["E", "S", "C", "I", "I"],
    "small_version": [1, 1, 0, 1, 0],
    "large_version": [1, 1, 1, 1, 0],
    "split": ["train", "train", "train", "test", "train"],
}
PRODUCTS = {
    "product_id": ["B1", "B2", "B1", "B3", "B7"],
    "product_title": ["Cable", "Other cable", "Zapatos", None, "Never judged"],
    "product_description": ["<p>Long</p>", None, None, None, None],
    "product_bullet_point": ["Strong", None, "", None, None],
    "product_brand": ["A", None, "B", None, None],
    "product_color": [None, None, None, None, None],
    "product_locale": ["us", "us", "es", "us", "us"],
}


def prepare_wands(tmp_path: Path, **changes: str) -> Dataset:
    given = tmp_path / "given"
    given.mkdir()
    for name, content in {**WANDS, **changes}.items():
        (given / name).write_text(content, encoding="utf-8")
    return prepare_dataset(find_adapter("wands"), tmp_path / "out", given=given)


def prepare_esci(tmp_path: Path, name: str = "esci", **changes: list[Any]) -> Dataset:
    given = tmp_path / "given"
    given.mkdir()
    stem = given / "shopping_queries_dataset"
    pl.DataFrame({**EXAMPLES, **changes}).write_parquet(f"{stem}_examples.parquet")
    products = pl.DataFrame(PRODUCTS, schema_overrides={"product_color": pl.String})
    products.write_parquet(f"{stem}_products.parquet")
    return prepare_dataset(find_adapter(name), tmp_path / "out", given=given)


def test_wands_has_tabs_doubled_quotes_and_three_grades(tmp_path: Path) -> None:
    dataset = prepare_wands(tmp_path)
    queries = dataset.read("queries").select("query", "text", "category").collect()
    assert queries.rows()[1:] == [
        ("208", 'fawkes 36" blue vanity', "Vanities"),
        ("216", "music", None),
    ]
    items = dataset.read("items").select("title", "text", "categories").collect()
    assert items.rows() == [
        (
            "solid wood bed",
            "good, deep sleep color:red|size:1",
            ["Furniture", "Bedroom Furniture", "Beds"],
        ),
        ('12" lamp', "two\nlines", []),
        ("chair", "color:blue", ["Furniture"]),
    ]
    first, second = query_lists(dataset)
    assert first.request.profile == {"query": "salon chair"}
    assert [c.id for c in first.request.candidates] == ["2", "0"]
    # A pair that was judged twice keeps its first judgement.
    assert first.grades == (4, 0)
    assert first.example.labels == ("4", "0")
    # A product that the files lack is left out.
    assert ([c.id for c in second.request.candidates], second.grades) == (["1"], (2,))
    assert dataset.manifest["dropped"] == {"repeated judgements": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label.csv": LABEL + "5\t0\t1\tGood\n"}, r"label\.csv: line 7: label should be Exact"),
        ({"label.csv": LABEL + "5\t0\t1\n"}, r"label\.csv: line 7: should have 4 fields, has 3"),
        ({"query.csv": QUERY.replace("\t", ",")}, r"query\.csv: line 1: should have the columns"),
    ],
)
def test_a_broken_wands_file_is_named(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare_wands(tmp_path, **changes)


def test_esci_keeps_locales_apart_and_grades_four_labels(tmp_path: Path) -> None:
    dataset = prepare_esci(tmp_path)
    items = dataset.read("items").select("item", "title", "text", "brand").collect()
    assert items.rows() == [
        ("us/B1", "Cable", "<p>Long</p> Strong", "A"),
        ("us/B2", "Other cable", None, None),
        ("es/B1", "Zapatos", None, "B"),
        ("us/B3", None, None, None),
    ]
    cables, shoes = query_lists(dataset)
    assert [(c.id, g) for c, g in zip(cables.request.candidates, cables.grades, strict=True)] == [
        ("us/B1", 4),
        ("us/B2", 2),
    ]
    assert cables.request.candidates[1].fields == {"text": "Other cable"}
    assert (shoes.request.profile, shoes.grades) == ({"query": "zapatos"}, (0,))
    assert [one.request.id for one in query_lists(dataset, split="test")] == ["9"]
    assert [one.request.id for one in query_lists(dataset, locale="us")] == ["7"]
    assert [one.request.id for one in query_lists(dataset, max_queries=1)] == ["7"]
    (short, _) = query_lists(dataset, max_text_chars=3)
    assert short.request.candidates[0].fields == {"text": "<p>", "title": "Cable"}


def test_esci_small_is_the_ranking_task(tmp_path: Path) -> None:
    dataset = prepare_esci(tmp_path, "esci-small")
    judged = dataset.read("judgements").select("query", "item", "label").collect()
    assert judged.rows() == [("7", "us/B1", "E"), ("7", "us/B2", "S"), ("9", "es/B1", "I")]


def test_a_broken_esci_file_is_named(tmp_path: Path) -> None:
    labels = ["E", "S", "X", "I", "I"]
    with pytest.raises(DataError, match=r"examples\.parquet: row 3: esci_label should be E, S"):
        prepare_esci(tmp_path, esci_label=labels)
    shutil.rmtree(tmp_path / "given")
    with pytest.raises(DataError, match=r"row 2: query should be text"):
        prepare_esci(tmp_path, query=["a", None, "b", "c", "d"])
    path = tmp_path / "given" / "shopping_queries_dataset_examples.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"examples\.parquet: row 1: cannot be read as Parquet"):
        prepare_dataset(find_adapter("esci"), tmp_path / "out", given=tmp_path / "given")


def cranfield(tmp_path: Path) -> Dataset:
    return prepare_dataset(
        find_adapter("cranfield"), tmp_path / "out", given=data_folder("cranfield")
    )


def test_cranfield_has_five_grades_and_texts_without_their_titles(tmp_path: Path) -> None:
    dataset = cranfield(tmp_path)
    rows = {name: table["rows"] for name, table in dataset.manifest["tables"].items()}
    assert rows == {"items": 1400, "queries": 150, "judgements": 1194}
    items = dataset.read("items").collect()
    both = items.filter(pl.col("text").is_not_null())
    # A few abstracts begin with their title once more.
    assert both.filter(pl.col("text").str.starts_with(pl.col("title"))).height < 10
    assert items.height - both.height == 2
    lists = list(query_lists(dataset))
    assert len(lists) == 150
    assert {grade for one in lists for grade in one.grades} == {0, 1, 2, 3, 4}
    # One judgement is of an empty document.
    assert sum(len(one.grades) for one in lists) == 1193


def test_unjudged_documents_stand_beside_the_judged_ones_as_0(tmp_path: Path) -> None:
    dataset = cranfield(tmp_path)
    plain = list(query_lists(dataset, max_queries=5))
    wide = list(query_lists(dataset, max_queries=5, unjudged_per_query=20, seed=3))
    for one, more in zip(plain, wide, strict=True):
        count = len(one.grades)
        ids = [candidate.id for candidate in more.request.candidates]
        assert len(set(ids)) == len(ids) == count + 20
        assert more.request.candidates[:count] == one.request.candidates
        assert more.grades == (*one.grades, *[0] * 20)
    again = list(query_lists(dataset, max_queries=5, unjudged_per_query=20, seed=3))
    assert again == wide


def test_long_lists_become_several_examples(tmp_path: Path) -> None:
    config = ExampleConfig(candidates_per_example=5)
    examples = list(make_examples(cranfield(tmp_path), "search-relevance", config))
    assert sum(len(example.labels) for example in examples) == 1193
    assert max(len(example.labels) for example in examples) == 5


def test_a_broken_grade_of_cranfield_is_named(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    docs = {"doc_id": [1], "title": ["a"], "author": ["b"], "text": ["a c"]}
    pl.DataFrame(docs).write_parquet(given / "docs.parquet")
    pl.DataFrame({"query_id": [1], "query": ["q"]}).write_parquet(given / "queries.parquet")
    judged = pl.DataFrame({"query_id": [1, 1], "doc_id": [1, 1], "grade": [4, 5]})
    judged.write_parquet(given / "qrels.parquet")
    adapter = find_adapter("cranfield")
    with pytest.raises(DataError, match=r"qrels\.parquet: row 2: grade should be 0 to 4, is 5"):
        prepare_dataset(adapter, tmp_path / "out", given=given)
    with pytest.raises(DataError, match="no address serves its files"):
        prepare_dataset(adapter, tmp_path / "out")
