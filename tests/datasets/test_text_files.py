"""Separated text and JSON lines: what they may hold, and the line of every fault."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from rankonce.datasets.text_files import (
    MAYBE_NUMBER,
    MAYBE_TEXT,
    TEXT,
    WHOLE,
    Column,
    check_rows,
    read_json_lines,
    read_table,
)
from rankonce.errors import DataError

COLUMNS = {"id": WHOLE, "title": TEXT, "note": MAYBE_TEXT}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_columns_are_found_by_name_and_quotes_hide_commas(tmp_path: Path) -> None:
    content = '\ufefftitle,more,id,note\r\n"Matrix, The ""1""",x,1,\r\n"two\nlines",x,2,n\r\n'
    path = write(tmp_path / "a.csv", content.encode())
    (frame,) = read_table(path, COLUMNS)
    assert frame.rows() == [(1, 'Matrix, The "1"', None, 2), (2, "two\nlines", "n", 4)]


def test_batches_hold_every_row_once(tmp_path: Path) -> None:
    content = "id\n" + "".join(f"{place}\n" for place in range(63))
    path = write(tmp_path / "a.csv.gz", content.encode())
    frames = list(read_table(path, {"id": WHOLE}, rows_per_batch=10))
    assert [frame.height for frame in frames] == [10] * 6 + [3]
    assert pl.concat(frames)["id"].to_list() == list(range(63))


def test_without_quotes_a_field_may_begin_with_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dat", '1::"One: a "film"::x\n\n'.encode("latin-1"))
    (frame,) = read_table(path, COLUMNS, separator="::", header=False, quotes=False)
    assert frame.rows() == [(1, '"One: a "film"', "x", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,title,note\n1,a,\n2,b\n", r"a\.csv: line 3: should have 3 fields, has 2"),
        (b"id,title,note\n1,a,\nx,b,\n", r"line 3: id: should be a whole number, is 'x'"),
        (b"id,title,note\n1.5,a,\n", r"line 2: id: should be a whole number, is '1.5'"),
        (b"id,title,note\n1, ,\n", r"line 2: title: should be text, is ' '"),
        (b"id,title,note\n1,a,\n2,\xff,\n", r"line 3: is not utf-8: invalid start byte"),
        (b'id,title,note\n1,"a,\n', r"line 2: unexpected end of data"),
        (b"id,title\n1,a\n", r"line 1: should have the columns note, has id, title"),
        (b"", r"line 1: should hold the names of the columns, the file is empty"),
    ],
)
def test_a_fault_has_its_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError, match=message):
        list(read_table(path, COLUMNS))


def test_numbers_must_be_finite(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a\n1\n""\nnan\n')
    with pytest.raises(DataError, match="line 4: a: should be a number, is 'nan'"):
        list(read_table(path, {"a": MAYBE_NUMBER}))
    assert Column().required


def test_a_rule_names_the_first_line_that_breaks_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"a\n1\n7\n8\n")
    (frame,) = read_table(path, {"a": WHOLE})
    with pytest.raises(DataError, match=r"line 3: a should be small, is \{'a': 7\}"):
        check_rows(path, frame, pl.col("a") < 5, "a should be small")


def test_json_lines_are_numbered_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", b'{"a": 1}\n\n{"a": 2}\n')
    assert list(read_json_lines(path)) == [[(1, {"a": 1}), (3, {"a": 2})]]
    path = write(tmp_path / "b.jsonl", b'{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"b\.jsonl: line 2: is not JSON"):
        list(read_json_lines(path))
    path = write(tmp_path / "c.jsonl", b"[]\n")
    with pytest.raises(DataError, match="line 1: should be a JSON object"):
        list(read_json_lines(path))


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    content = gzip.compress(b"".join(b'{"a": %d}\n' % place for place in range(5000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: line \d+: is cut or not gzip"):
        list(read_json_lines(path))
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"line 1: is cut or not gzip"):
        list(read_json_lines(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_json_lines(tmp_path / "none.jsonl"))
