"""Rows of separated text and of JSON lines in batches, with the line of every fault.

One batch is in memory at a time. A line is decoded by itself, so that a bad byte has a line too.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl

from rankonce.errors import DataError

_ROWS_PER_BATCH = 200_000
_LINES_PER_BATCH = 50_000
_WORDS = {pl.Int64: "a whole number", pl.Float64: "a number"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column to read.

    Attributes:
        type: ``pl.String``, ``pl.Int64`` or ``pl.Float64``.
        required: an empty field is a fault; else it is null.
    """

    type: Any = pl.String
    required: bool = True


TEXT = Column()
WHOLE = Column(type=pl.Int64)
NUMBER = Column(type=pl.Float64)
MAYBE_TEXT = Column(required=False)
MAYBE_NUMBER = Column(type=pl.Float64, required=False)


def read_table(
    path: Path,
    columns: Mapping[str, Column],
    *,
    separator: str = ",",
    encoding: str = "utf-8",
    header: bool = True,
    quotes: bool = True,
    rows_per_batch: int = _ROWS_PER_BATCH,
) -> Iterator[pl.DataFrame]:
    """Read separated text, plain or gzip by the name.

    Args:
        columns: those wanted, by their names in the header. Without a header these are all
            columns, in their order.
        separator: one character, or several where there are no quotes.
        quotes: whether a field may stand in double quotes, with separators and line feeds in it.

    Returns:
        Frames of the columns and of ``line``, where each row ends in the file.

    Raises:
        DataError: names the file, the line and what is wrong.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    decoded = _read_lines(path, encoding)
    records = _quoted(path, decoded, separator) if quotes else _plain(decoded, separator)
    names = None if header else list(columns)
    for line, row in records:
        if names is None:
            names = [name.strip().lstrip("\ufeff") for name in row]
            if missing := [name for name in columns if name not in names]:
                raise DataError(
                    f"{path}: line {line}: should have the columns {', '.join(missing)}, "
                    f"has {', '.join(names)}"
                )
            continue
        if len(row) != len(names):
            if not any(row):
                continue
            raise DataError(f"{path}: line {line}: should have {len(names)} fields, has {len(row)}")
        rows.append(row)
        lines.append(line)
        if len(rows) == rows_per_batch:
            yield _frame(path, columns, names, rows, lines)
            rows, lines = [], []
    if names is None:
        raise DataError(f"{path}: line 1: should hold the names of the columns, the file is empty")
    if rows:
        yield _frame(path, columns, names, rows, lines)


def read_json_lines(path: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Read JSON lines, plain or gzip by the name, as batches of line number and object.

    Raises:
        DataError: names the file and the line.
    """
    batch: list[tuple[int, dict[str, Any]]] = []
    for number, line in _read_lines(path, "utf-8"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number}: should be a JSON object")
        batch.append((number, record))
        if len(batch) == _LINES_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def check_rows(path: Path, frame: pl.DataFrame, is_right: pl.Expr, should: str) -> None:
    """Refuse a frame of ``read_table`` that has a row for which an expression does not hold.

    Raises:
        DataError: names the file and the first such line.
    """
    wrong = frame.filter(~is_right.fill_null(False)).head(1)
    if wrong.height:
        row = wrong.row(0, named=True)
        raise DataError(f"{path}: line {row.pop('line')}: {should}, is {row}")


def _read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(path) as file:
            for raw in file:
                number += 1
                yield number, raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number}: is not {encoding}: {error.reason}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: line {number + 1}: is cut or not gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _plain(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        yield number, line.rstrip("\r\n").split(separator)


def _quoted(
    path: Path, lines: Iterator[tuple[int, str]], separator: str
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _frame(
    path: Path,
    columns: Mapping[str, Column],
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[int],
) -> pl.DataFrame:
    values = list(zip(*rows, strict=True))
    series = [
        _convert(path, name, column, values[names.index(name)], lines)
        for name, column in columns.items()
    ]
    return pl.DataFrame([*series, pl.Series("line", lines, dtype=pl.Int64)])


def _convert(
    path: Path, name: str, column: Column, values: Sequence[str], lines: Sequence[int]
) -> pl.Series:
    raw = pl.Series(name, values, dtype=pl.String).str.strip_chars()
    raw = raw.set(raw == "", None)
    found = raw if column.type == pl.String else raw.cast(column.type, strict=False)
    faulty = found.is_null() & raw.is_not_null()
    if column.type == pl.Float64:
        faulty |= ~found.is_finite().fill_null(True)
    if column.required:
        faulty |= raw.is_null()
    if faulty.any():
        place = faulty.arg_max() or 0
        words = _WORDS.get(column.type, "text")
        raise DataError(
            f"{path}: line {lines[place]}: {name}: should be {words}, is {values[place]!r}"
        )
    return found
