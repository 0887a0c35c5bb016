"""Shards: together they are the input, each by itself is whole, and a folder is of one run."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankonce.cli.cluster.shards import (
    Shard,
    ShardFolder,
    plan_shards,
    read_shard,
    shard_lines,
)
from rankonce.cli.request_files import RequestLine, read_lines
from rankonce.errors import DataError, RequestError

MANIFEST = {"requests": "ab", "shard_rows": 2, "num_shards": 3}


def lines_of_shards(path: Path, shards: Iterable[Shard]) -> list[list[RequestLine]]:
    return [[*shard_lines(read_shard(path, shard), shard, path)] for shard in shards]


def write_parquet(path: Path, num_rows: int, **options: Any) -> Path:
    rows = [{"task": "movie-like", "id": str(i), "history": [{"time": i}]} for i in range(num_rows)]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize(
    "text", [b"a\nb\n\nc\n  \nd\n", b"a\nb\n\nc\n  \nd", b"\n\na", b"\xff\n\n\n\n\n\n\nb\n"]
)
def test_shards_of_json_lines_are_the_file_with_its_numbers(
    tmp_path: Path, text: bytes, shard_rows: int
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(text)
    shards, _ = plan_shards(path, shard_rows=shard_rows)
    read = lines_of_shards(path, shards)
    assert [line for lines in read for line in lines] == [*read_lines(path)]
    assert b"".join(read_shard(path, shard) for shard in shards) == text
    assert [shard.index for shard in shards] == [*range(len(shards))]
    assert all(shard.num_lines == shard_rows for shard in shards[:-1])
    for shard, lines in zip(shards, read, strict=True):
        assert all(shard.first <= line.number <= shard.last for line in lines)


@pytest.mark.parametrize("shard_rows", [1, 63, 64, 100, 250, 251])
@pytest.mark.parametrize("group_rows", [1, 7, 70, 1000])
def test_shards_of_parquet_are_the_file_with_its_numbers(
    tmp_path: Path, shard_rows: int, group_rows: int
) -> None:
    path = write_parquet(tmp_path / "in.parquet", 250, row_group_size=group_rows)
    shards, _ = plan_shards(path, shard_rows=shard_rows)
    read = lines_of_shards(path, shards)
    assert [line for lines in read for line in lines] == [*read_lines(path)]
    assert [len(lines) for lines in read] == [shard.num_lines for shard in shards]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_file_without_requests_has_no_shards(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, 1)
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        path.write_bytes(b"")
    assert plan_shards(path, shard_rows=3)[0] == []


def test_the_digest_knows_every_byte(tmp_path: Path) -> None:
    path, digests = tmp_path / "in.jsonl", set()
    for text in (b"a\nb\n", b"a\nb", b"a\nc\n", b"a\n\nb\n"):
        path.write_bytes(text)
        digests.add(plan_shards(path, shard_rows=1)[1])
    assert len(digests) == 4
    parquet = write_parquet(tmp_path / "in.parquet", 3)
    first = plan_shards(parquet, shard_rows=1)[1]
    assert plan_shards(write_parquet(parquet, 4), shard_rows=1)[1] != first


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(RequestError, match=r"in\.parquet: is not a Parquet file"):
        plan_shards(path, shard_rows=1)


def test_names_of_shards_sort_as_they_stand_in_the_input() -> None:
    shards = [Shard(index=index, first=1, num_lines=1) for index in (0, 9, 10, 99_999, 100_000)]
    names = [ShardFolder(Path(), suffix=".jsonl").results(shard).name for shard in shards]
    assert names == sorted(names)
    assert names[2] == "shard-000010.jsonl"


def shard_folder(tmp_path: Path, **options: Any) -> ShardFolder:
    folder = ShardFolder(tmp_path / "out", suffix=".jsonl")
    folder.begin(MANIFEST, **{"resume": False, **options})
    return folder


def test_a_shard_is_done_when_it_has_its_name(tmp_path: Path) -> None:
    folder, shard = shard_folder(tmp_path), Shard(index=1, first=3, num_lines=2)
    results, rejects = folder.attempt(shard)
    results.write_text("results\n")
    rejects.write_text("rejects\n")
    assert not folder.is_done(shard)
    assert not folder.rejects(shard).exists()
    folder.publish(shard, results, rejects)
    assert folder.is_done(shard)
    folder.finish()
    assert {path.name for path in folder.path.iterdir()} == {
        "manifest.json",
        "shard-000001.jsonl",
        "shard-000001.rejects.jsonl",
    }


def test_a_shard_that_two_workers_finish_is_there_once(tmp_path: Path) -> None:
    folder, shard = shard_folder(tmp_path), Shard(index=0, first=1, num_lines=2)
    attempts = [folder.attempt(shard), folder.attempt(shard)]
    for results, _ in attempts:
        results.write_text("the same\n")
    for results, rejects in attempts:
        folder.publish(shard, results, rejects)
    assert folder.results(shard).read_text() == "the same\n"
    assert [path.name for path in folder.path.glob("shard*")] == ["shard-000000.jsonl"]


def test_attempts_are_counted_by_worker_and_forgotten_by_the_next_run(tmp_path: Path) -> None:
    folder, shard = shard_folder(tmp_path), Shard(index=0, first=1, num_lines=2)
    other = Shard(index=1, first=3, num_lines=2)
    assert folder.attempts(shard) == 0
    for count in (1, 2):
        for path in folder.attempt(shard):
            path.touch()
        assert (folder.attempts(shard), folder.attempts(other)) == (count, 0)
    assert str(os.getpid()) in folder.attempt(shard)[0].name
    assert shard_folder(tmp_path, resume=True).attempts(shard) == 0


def test_a_folder_that_holds_a_run_is_only_resumed(tmp_path: Path) -> None:
    shard_folder(tmp_path)
    with pytest.raises(DataError, match=r"--out: .*out holds a run; --resume goes on with it"):
        shard_folder(tmp_path)
    shard_folder(tmp_path, resume=True)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    for resume in (False, True):
        with pytest.raises(DataError, match=r"--out: .*out holds no run, and is not empty"):
            shard_folder(tmp_path, resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("name", [*MANIFEST, "model"])
def test_a_run_of_other_input_or_model_is_not_resumed(tmp_path: Path, name: str) -> None:
    shard_folder(tmp_path)
    folder = ShardFolder(tmp_path / "out", suffix=".jsonl")
    with pytest.raises(DataError, match=rf"another run: {name} was .*, is \"new\""):
        folder.begin({**MANIFEST, name: "new"}, resume=True)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == MANIFEST
