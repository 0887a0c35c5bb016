"""CoLLM's split, cut from MovieLens-1M: its months, its histories, and the published rows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from rankonce.datasets.collm_split import CollmSplit, read_collm_split
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError
from rankonce.prompts.tasks import library_tasks
from rankonce.training.recipes import find_recipe
from tests.conftest import data_folder

Rating = tuple[int, int, int, int]
KEYS = ["user_id", "item_id", "timestamp"]


def moment(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp())  # type: ignore[misc, arg-type]


def prepare(path: Path, ratings: Sequence[Rating], films: Sequence[tuple[int, str, str]]) -> Path:
    """Write GroupLens' files and bring them into the common form."""
    given = path / "given"
    given.mkdir()
    lines = (f"{member}::{film}::{stars}::{time}\n" for member, film, stars, time in ratings)
    (given / "ratings.dat").write_text("".join(lines))
    names = (f"{film}::{title}::{genres}\n" for film, title, genres in films)
    (given / "movies.dat").write_text("".join(names), encoding="latin-1")
    prepare_dataset(find_adapter("ml-1m"), path / "ml-1m", given=given)
    return path / "ml-1m"


EDGES: Sequence[Rating] = (
    (7, 10, 5, moment(2001, 5, 31, 23, 59, 59)),
    (7, 11, 4, moment(2001, 6, 1)),
    (7, 13, 5, moment(2002, 3, 31, 23, 59, 59)),
    (7, 12, 3, moment(2002, 3, 31, 23, 59, 59)),
    (7, 10, 2, moment(2002, 4, 1)),
    (20, 14, 5, moment(2002, 8, 31, 23, 59, 59)),
    (7, 14, 5, moment(2002, 9, 1)),
    (7, 15, 1, moment(2003, 1, 31, 23, 59, 59)),
    (7, 16, 5, moment(2003, 2, 1)),
)
FILMS = tuple((film, f"Film {film} (1990)", "Action|Drama") for film in range(10, 18))


def rows_of(part: pl.DataFrame | None) -> list[tuple[object, ...]]:
    assert part is not None
    return part.select("user_id", "item_id", "label", "history_ids").rows()


def test_parts_begin_and_end_with_months_and_histories_go_on(tmp_path: Path) -> None:
    split = read_collm_split(prepare(tmp_path, EDGES, FILMS))
    # What was liked before June 2001 is no event; of one second the earlier line is.
    assert rows_of(split.train) == [(7, 11, 1, []), (7, 13, 1, [11]), (7, 12, 0, [11, 13])]
    assert rows_of(split.valid) == [(7, 10, 0, [11, 13]), (20, 14, 1, [])]
    assert rows_of(split.test) == [(7, 14, 1, [11, 13]), (7, 15, 0, [11, 13, 14])]
    assert split.items.rows() == [
        (film, f"Film {film} (1990)", "Action|Drama") for film in range(10, 16)
    ]
    assert split.tables().keys() == {"train", "valid", "test", "items"}


def test_the_published_rows_come_out(tmp_path: Path) -> None:
    known = data_folder("ml1m")
    parts = [pl.read_parquet(known / f"{name}.parquet") for name in ("train", "valid")]
    # The published files have the order of the ratings of one second.
    rows = pl.concat(parts).sort("user_id", "timestamp", maintain_order=True)
    ratings = [
        (member, film, 4 if label else 3, time)
        for member, film, label, time in rows.select(
            "user_id", "item_id", "label", "timestamp"
        ).iter_rows()
    ]
    # The test part is not here: one rating stands for it.
    ratings.append((ratings[-1][0], ratings[-1][1], 5, moment(2002, 9, 1)))
    films = pl.read_parquet(known / "items.parquet").select("item_id", "title", "genres").rows()
    split = read_collm_split(prepare(tmp_path, ratings, films))
    for part, published in zip((split.train, split.valid), parts, strict=True):
        columns = [*KEYS, "label", "history_ids"]
        assert part.height == published.height
        both = [frame.select(columns).sort(*KEYS, "label") for frame in (part, published)]
        assert both[0].rows() == both[1].rows()


def test_the_recipe_reads_either_form(tmp_path: Path) -> None:
    """And writes the parts that it cut, for ``rankonce evaluate``."""
    ratings = [
        (member, 10 + (member + number) % 6, 5 - 2 * (number % 2), time + 60 * number)
        for member in range(1, 13)
        for time in (moment(2001, 7, member), moment(2002, 5, member), moment(2002, 10, member))
        for number in range(6)
    ]
    prepared = prepare(tmp_path, ratings, FILMS)
    split: CollmSplit = read_collm_split(prepared)
    files = tmp_path / "files"
    files.mkdir()
    for name, table in split.tables().items():
        table.write_parquet(files / f"{name}.parquet")
    stage = find_recipe("ml1m-alone").stages[-1]
    sources = [stage.load(folder, stage.config, library_tasks()) for folder in (prepared, files)]
    assert sources[0] is not None
    assert sources[1] is not None
    assert sources[0].valid == sources[1].valid
    assert [len(source.split) for source in sources if source] == [4, 0]
    made = [list(source.examples(0)) for source in sources if source and source.examples]
    assert made[0] == made[1]
    assert made[0]


def test_what_is_no_such_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train\.parquet, valid\.parquet, items\.parquet"):
        read_collm_split(tmp_path)
    with pytest.raises(DataError, match="rankonce datasets ml-1m"):
        read_collm_split(tmp_path)
    early = prepare(tmp_path, EDGES[:6], FILMS)
    with pytest.raises(DataError, match="has no ratings of the test part"):
        read_collm_split(early)
    other = tmp_path / "other"
    other.mkdir()
    for name, text in (
        ("movies.csv", "movieId,title,genres\n1,A,Drama\n"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,1,4.0,5\n"),
        ("tags.csv", "userId,movieId,tag,timestamp\n1,1,x,5\n"),
    ):
        (other / name).write_text(text)
    prepare_dataset(find_adapter("ml-latest-small"), tmp_path / "small", given=other)
    with pytest.raises(DataError, match="should hold ml-1m, holds ml-latest-small"):
        read_collm_split(tmp_path / "small")
