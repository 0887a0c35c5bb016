import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rankonce.errors import DataError
from rankonce.serving.batches.batch_store import Batch, BatchStore, LineResult
from rankonce.serving.batches.database import Database
from rankonce.serving.batches.file_store import FileInUseError, FileStore
from rankonce.serving.batches.folder import DataFolder
from rankonce.serving.batches.lines import Line, LineFault


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder(tmp_path / "data")
    yield folder
    folder.close()


@pytest.fixture
def database(folder: DataFolder) -> Iterator[Database]:
    with closing(Database(folder.database)) as database:
        yield database


@pytest.fixture
def files(database: Database, folder: DataFolder) -> FileStore:
    return FileStore(database, folder, keep_s=100)


@pytest.fixture
def batches(database: Database) -> BatchStore:
    return BatchStore(database, keep_output_s=100)


def add(files: FileStore, *, keep_s: int | None = None) -> str:
    partial = files.new_partial()
    partial.write_text("{}\n")
    return files.add(partial, owner="ann", filename="a.jsonl", keep_s=keep_s).id


def create(batches: BatchStore, file_id: str) -> Batch:
    batch = batches.create(
        owner="ann",
        endpoint="/v1/rank",
        input_file_id=file_id,
        completion_window="1h",
        window_s=3600,
    )
    assert batch is not None
    return batch


def result(batch: Batch, number: int, text: str, *, failed: bool = False) -> LineResult:
    return LineResult(batch_id=batch.id, number=number, failed=failed, text=text, input_tokens=3)


def begin(batches: BatchStore, batch: Batch, num_lines: int) -> None:
    lines = [
        Line(number=number, custom_id=f"{number}", start=0, num_bytes=1)
        for number in range(1, num_lines + 1)
    ]
    batches.begin(batch.id, lines)


def test_the_first_result_of_a_line_counts(files: FileStore, batches: BatchStore) -> None:
    batch = create(batches, add(files))
    begin(batches, batch, 3)
    batches.record([result(batch, 2, "b"), result(batch, 2, "other", failed=True)])
    batches.record([result(batch, 2, "b"), result(batch, 1, "a", failed=True)])
    assert [line.number for line in batches.pending(batch.id, after=0, limit=9)] == [3]
    assert list(batches.results(batch.id, failed=False)) == ["b"]
    assert list(batches.results(batch.id, failed=True)) == ["a"]
    found = batches.get(batch.id)
    assert (found.num_completed, found.num_failed, found.input_tokens) == (1, 1, 6)
    batches.begin_finalizing(batch.id)
    assert batches.get(batch.id).status == "in_progress"
    batches.record([result(batch, 3, "c")])
    batches.begin_finalizing(batch.id)
    assert batches.get(batch.id).status == "finalizing"


def test_results_come_in_the_order_of_the_lines(files: FileStore, batches: BatchStore) -> None:
    # More than one read takes.
    batch = create(batches, add(files))
    begin(batches, batch, 1203)
    batches.record([result(batch, number, f"{number}") for number in range(1203, 0, -1)])
    assert list(batches.results(batch.id, failed=False)) == [f"{n}" for n in range(1, 1204)]


def test_a_batch_that_has_ended_takes_no_result(files: FileStore, batches: BatchStore) -> None:
    batch = create(batches, add(files))
    begin(batches, batch, 2)
    assert batches.cancel(batch.id)
    batches.finish(batch.id, output=None, error=None, num_completed=0, num_failed=0)
    batches.record([result(batch, 1, "late")])
    assert batches.get(batch.id).num_completed == 0
    assert list(batches.results(batch.id, failed=False)) == []
    assert not batches.cancel(batch.id)
    assert batches.unfinished() == []
    batches.drop_lines()
    assert batches.pending(batch.id, after=0, limit=9) == []


def test_a_batch_that_is_cancelled_before_it_begins_stays_so(
    files: FileStore, batches: BatchStore
) -> None:
    batch = create(batches, add(files))
    assert batches.cancel(batch.id)
    begin(batches, batch, 2)
    batches.fail(batch.id, [LineFault(code="x", message="y")])
    found = batches.get(batch.id)
    assert (found.status, found.num_lines, found.errors) == ("cancelling", 0, None)


def test_a_file_goes_when_its_time_has_passed_and_no_batch_reads_it(
    files: FileStore, batches: BatchStore
) -> None:
    kept, read, passed = add(files), add(files, keep_s=1), add(files, keep_s=0)
    batch = create(batches, read)
    time.sleep(1.1)
    assert files.find(kept, owner="ann") is not None
    assert files.find(read, owner="ann") is None
    assert files.delete_expired() == 1
    assert not files.path(passed).exists()
    assert files.path(read).exists()
    batches.fail(batch.id, [])
    assert files.delete_expired() == 1
    assert not files.path(read).exists()
    assert files.path(kept).exists()


def test_only_what_is_read_by_a_batch_at_work_is_in_use(
    files: FileStore, batches: BatchStore
) -> None:
    file_id = add(files)
    batch = create(batches, file_id)
    with pytest.raises(FileInUseError):
        files.delete(file_id, owner="ann")
    assert not files.delete(file_id, owner="ben")
    batches.fail(batch.id, [])
    assert files.delete(file_id, owner="ann")


def test_leftovers_go_and_the_files_of_others_stay(files: FileStore, folder: DataFolder) -> None:
    known = add(files)
    lost = folder.files / f"file-{'0' * 32}-output"
    lost.write_text("x")
    theirs = folder.files / "file-notes"
    theirs.write_text("x")
    files.new_partial().write_text("x")
    files.delete_leftovers()
    assert {path.name for path in folder.files.iterdir()} == {known, "file-notes"}
    assert list(folder.partial.iterdir()) == []


def test_a_folder_has_one_server(folder: DataFolder) -> None:
    path = folder.files.parent
    with pytest.raises(OSError, match=re.escape(f"{path}: another server uses it")):
        DataFolder(path)
    assert path.stat().st_mode & 0o077 == 0


def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "batches.sqlite3"
    Database(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(DataError, match="a newer RankOnce wrote it"):
        Database(path)
