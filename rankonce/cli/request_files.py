"""Files of requests, read one at a time: JSON lines and Parquet."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, BinaryIO

from rankonce.errors import RequestError
from rankonce.records import ScoreRequest, read_request

STDIN = Path("-")
ROWS_AT_ONCE = 64
_NESTED_COLUMNS = ("profile", "history", "examples", "candidates")


@dataclass(frozen=True, kw_only=True)
class RequestLine:
    """One request as it stands in its file.

    Attributes:
        number: 1-based number of the line, or of the row.
        content: the line as bytes, or the row as a dictionary.
    """

    number: int
    content: bytes | dict[str, Any]

    @property
    def text(self) -> str:
        """The line as it came, a row as JSON."""
        if isinstance(self.content, bytes):
            return self.content.decode("utf-8", "replace").rstrip("\r\n")
        return json.dumps(self.content, ensure_ascii=False, default=str)

    def read(self) -> ScoreRequest:
        """Make a request of it.

        Raises:
            RequestError: names what is wrong.
        """
        if isinstance(self.content, bytes):
            return read_request(parse_json(self.content.strip()))
        return read_request(_row_data(self.content))


def is_parquet(path: Path) -> bool:
    """Tell Parquet from JSON lines by the suffix."""
    return path.suffix.lower() == ".parquet"


def read_lines(path: Path) -> Iterator[RequestLine]:
    """Read requests one at a time; blank lines are left out.

    Args:
        path: a Parquet file by its suffix, else JSON lines; ``-`` reads JSON lines from stdin.
    """
    if is_parquet(path):
        yield from _read_parquet(path)
    elif path == STDIN:
        yield from read_json_lines(sys.stdin.buffer)
    else:
        with path.open("rb") as file:
            yield from read_json_lines(file)


def measure(path: Path) -> int | None:
    """Return the size of a file in the unit of ``size_of``, for a progress bar; none for stdin."""
    if path == STDIN:
        return None
    if is_parquet(path):
        return int(open_parquet(path).metadata.num_rows)
    return path.stat().st_size or None  # 0: a pipe


def size_of(line: RequestLine) -> int:
    """Bytes of a line, 1 for a row."""
    return len(line.content) if isinstance(line.content, bytes) else 1


def parse_json(text: bytes) -> Any:
    """Decode JSON, without the NaN and Infinity that Python would let pass.

    Raises:
        RequestError: says where the text stops being JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_json_lines(file: BinaryIO, *, first: int = 1) -> Iterator[RequestLine]:
    """Read JSON lines one at a time; blank lines are left out but counted.

    Args:
        first: number of the file's first line.
    """
    for number, line in enumerate(file, start=first):
        if line.strip():
            yield RequestLine(number=number, content=line)


def _read_parquet(path: Path) -> Iterator[RequestLine]:
    batches = open_parquet(path).iter_batches(batch_size=ROWS_AT_ONCE)
    return read_rows(batches, path=path)


def read_rows(batches: Iterable[Any], *, path: Path, first: int = 1) -> Iterator[RequestLine]:
    """Read the rows of Arrow's record batches one at a time.

    Args:
        path: the file that they come from.
        first: number of the first row.
    """
    from pyarrow import ArrowException

    number = first - 1
    try:
        for batch in batches:
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield RequestLine(number=number, content=row)
    except (ArrowException, KeyError) as error:  # KeyError: a map that has a key twice
        raise RequestError(f"{path}: broken after row {number}: {error}") from error


def open_parquet(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        RequestError: it is none.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except ArrowException as error:
        raise RequestError(f"{path}: is not a Parquet file: {error}") from error


def _row_data(row: dict[str, Any]) -> Any:
    """Bring a row into the form of decoded JSON."""
    data = _without_nulls(row)
    for name in _NESTED_COLUMNS:
        if isinstance(data.get(name), str):
            try:
                data[name] = parse_json(data[name].encode())
            except RequestError as error:
                raise RequestError(f"{name}: {error}") from error
    return data


def _without_nulls(value: Any) -> Any:
    # A column of structs has every field of the file; what a row does not have is null there.
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return value.isoformat()
    return value
