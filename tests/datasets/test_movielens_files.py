"""MovieLens in its three formats, with what is odd in each."""

import zipfile
from pathlib import Path

import pytest

from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError

FLAGS = "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
NO_FLAGS = "1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0"
U_ITEM = (
    f"1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|{FLAGS}\n"
    f"2|Cité des enfants perdus, La (1995)|01-Jan-1995|||{FLAGS}\n"
    f"267|unknown||||{NO_FLAGS}\n"
).encode("latin-1")
U_DATA = b"196\t1\t3\t881250949\n186\t2\t5\t891717742\n196\t2\t4\t881250949\n196\t1\t3\t881250949\n"
MOVIES_DAT = (
    "1::Toy Story (1995)::Animation|Children's|Comedy\n"
    "2::Star Wars: Episode IV - A New Hope (1977)::Action\n"
    "3::Misérables, Les (1998)::Drama\n"
).encode("latin-1")
RATINGS_DAT = b"1::1::5::978300760\n1::2::3::978302109\n2::3::4::978301968\n"
MOVIES_CSV = (
    "movieId,title,genres\n"
    '1,"American President, The (1995)",Comedy|Drama\n'
    "2,Amélie (Fabuleux destin d'Amélie Poulain) (2001),(no genres listed)\n"
    '3,"""Great Performances"" Cats (1998)",Musical\n'
    "4,Untitled,Drama\n"
)
RATINGS_CSV = "userId,movieId,rating,timestamp\n1,3,0.5,1147880044\n1,1,5.0,1147868817\n2,2,3.5,1\n"


# A tag may be any text, the word null as well.
TAGS_CSV = (
    "userId,movieId,tag,timestamp\n"
    '2,1,"drama, ""slow""",1137179352\n'
    "2,3,null,5\n2,3,,6\n2,3,null,5\n"
)


def folder(path: Path, files: dict[str, bytes | str]) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (path / name).write_bytes(data)
    return path


def prepare(name: str, tmp_path: Path, files: dict[str, bytes | str]):
    given = folder(tmp_path / "given", files)
    return prepare_dataset(find_adapter(name), tmp_path / "out", given=given)


def test_100k_is_latin_1_with_flags_for_genres(tmp_path: Path) -> None:
    dataset = prepare("ml-100k", tmp_path, {"u.item": U_ITEM, "u.data": U_DATA})
    items = dataset.read("items").select("item", "title", "categories", "year").collect()
    genres = ["Animation", "Children's", "Comedy"]
    assert items.rows() == [
        ("1", "Toy Story (1995)", genres, 1995),
        ("2", "Cité des enfants perdus, La (1995)", genres, 1995),
        ("267", "unknown", [], None),
    ]
    events = dataset.read("events").filter(member="196").collect()
    # The row that stands there twice counts once; of one second the file's order stays.
    assert events.select("item", "action", "value", "time").rows() == [
        ("1", "rated", 3.0, 881250949),
        ("2", "rated", 4.0, 881250949),
    ]
    assert dataset.manifest["dropped"] == {"repeated events": 1}


def test_1m_is_latin_1_with_double_colons(tmp_path: Path) -> None:
    dataset = prepare("ml-1m", tmp_path, {"movies.dat": MOVIES_DAT, "ratings.dat": RATINGS_DAT})
    titles = dataset.read("items").collect()["title"].to_list()
    assert titles[1:] == ["Star Wars: Episode IV - A New Hope (1977)", "Misérables, Les (1998)"]
    assert dataset.read("events").filter(member="1").collect()["value"].to_list() == [5, 3]


@pytest.mark.parametrize("name", ["ml-20m", "ml-32m", "ml-latest", "ml-latest-small"])
def test_the_others_are_csv_in_an_archive(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as zipped:
        zipped.writestr(f"{name}/movies.csv", MOVIES_CSV)
        zipped.writestr(f"{name}/ratings.csv", RATINGS_CSV)
        zipped.writestr(f"{name}/tags.csv", TAGS_CSV)
    dataset = prepare_dataset(find_adapter(name), tmp_path / "out", given=tmp_path / f"{name}.zip")
    items = dataset.read("items").select("title", "categories", "year").collect()
    assert items.rows() == [
        ("American President, The (1995)", ["Comedy", "Drama"], 1995),
        ("Amélie (Fabuleux destin d'Amélie Poulain) (2001)", [], 2001),
        ('"Great Performances" Cats (1998)', ["Musical"], 1998),
        ("Untitled", ["Drama"], None),
    ]
    events = dataset.read("events").filter(member="1").collect()
    assert events["item"].to_list() == ["1", "3"]
    assert events["value"].to_list() == [5.0, 0.5]
    assert dataset.read("tags").collect().rows() == [
        ("2", "1", 'drama, "slow"', 1137179352),
        ("2", "3", "null", 5),
    ]
    assert dataset.manifest["dropped"] == {"empty tags": 1, "repeated tags": 1}


def test_a_set_in_which_nobody_wrote_a_tag_has_a_table_without_rows(tmp_path: Path) -> None:
    header = "userId,movieId,tag,timestamp\n"
    files = {"movies.csv": MOVIES_CSV, "ratings.csv": RATINGS_CSV, "tags.csv": header}
    assert prepare("ml-32m", tmp_path, {**files}).read("tags").collect().is_empty()


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "ml-100k",
            {"u.item": U_ITEM, "u.data": U_DATA + b"1\t1\t6\t5\n"},
            r"u\.data: line 5: rating should be 1 to 5 stars",
        ),
        (
            "ml-100k",
            {"u.item": b"1|Toy Story (1995)|01-Jan-1995\n", "u.data": U_DATA},
            r"u\.item: line 1: should have 24 fields, has 3",
        ),
        (
            "ml-1m",
            {"movies.dat": MOVIES_DAT, "ratings.dat": b"1::1::5::978300760\n1::1::5\n"},
            r"ratings\.dat: line 2: should have 4 fields, has 3",
        ),
        (
            "ml-32m",
            {"movies.csv": MOVIES_CSV, "ratings.csv": RATINGS_CSV + "1,1,4.2,7\n"},
            r"ratings\.csv: line 5: rating should be 0\.5 to 5 in half stars",
        ),
        (
            "ml-32m",
            {"movies.csv": MOVIES_CSV, "ratings.csv": RATINGS_CSV + "1,1,4.5,\n"},
            r"ratings\.csv: line 5: timestamp: should be a whole number, is ''",
        ),
        ("ml-32m", {"movies.csv": MOVIES_CSV}, r"should hold a file ratings\.csv"),
        ("ml-32m", {"other.txt": ""}, r"should hold files of ml-32m: movies\.csv"),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_left(
    tmp_path: Path, name: str, files: dict[str, bytes | str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(name, tmp_path, files)
    assert list((tmp_path / "out").iterdir()) == []
