"""The lines of a batch's input file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from rankonce.records import describe_faults

# A file may have a fault in every line.
_MAX_FAULTS = 100


@dataclass(frozen=True, kw_only=True)
class Line:
    """Where a line of an input file stands.

    Attributes:
        number: counts from 1, blank lines too.
        start: its first byte in the file.
    """

    number: int
    custom_id: str
    start: int
    num_bytes: int


class LineFault(BaseModel):
    """What is wrong with a line, in OpenAI's form; without ``line`` it is the whole file's."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class _LineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def check_lines(
    path: Path, *, endpoint: str, max_lines: int, max_line_bytes: int
) -> tuple[list[Line], list[LineFault]]:
    """Check every line of an input file.

    Returns:
        The lines, which are to be used if there are no faults; and the first faults.
    """
    lines: list[Line] = []
    faults: list[LineFault] = []
    num_faults = 0
    seen: dict[str, int] = {}
    for number, start, raw in _read(path):
        if len(lines) + num_faults >= max_lines:
            message = f"the file should have at most {max_lines:,} lines"
            return [], [LineFault(code="too_many_lines", message=message)]
        try:
            custom_id = _check(raw, endpoint, max_line_bytes)
            if first := seen.get(custom_id):
                raise _LineError(
                    "duplicate_custom_id",
                    f"custom_id: should be unique, line {first} has {custom_id!r} too",
                    "custom_id",
                )
        except _LineError as error:
            num_faults += 1
            if num_faults <= _MAX_FAULTS:
                faults.append(
                    LineFault(code=error.code, message=str(error), param=error.param, line=number)
                )
            continue
        seen[custom_id] = number
        lines.append(Line(number=number, custom_id=custom_id, start=start, num_bytes=len(raw)))
    if num_faults > _MAX_FAULTS:
        message = f"and {num_faults - _MAX_FAULTS:,} more lines with faults"
        faults.append(LineFault(code="more_faults", message=message))
    if not lines and not faults:
        faults.append(LineFault(code="empty_file", message="the file should have a line"))
    return lines, faults


def read_body(file: BinaryIO, line: Line) -> dict[str, Any]:
    """Read the body of a line that was checked; threads may share the file."""
    raw = os.pread(file.fileno(), line.num_bytes, line.start)
    body: dict[str, Any] = from_json(raw)["body"]
    return body


def _read(path: Path) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.isspace():
                yield number, start, raw
            start += len(raw)


def _check(raw: bytes, endpoint: str, max_line_bytes: int) -> str:
    """Return the line's ``custom_id``."""
    if len(raw) > max_line_bytes:
        raise _LineError("line_too_large", f"the line should have at most {max_line_bytes:,} bytes")
    try:
        question = _Question.model_validate(from_json(raw, allow_inf_nan=False))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        place = faults[0]["loc"]
        raise _LineError(
            "invalid_line" if place else "invalid_json_line",
            describe_faults(faults[:5]).replace("request:", "the line:"),
            str(place[0]) if place else None,
        ) from error
    except ValueError as error:
        raise _LineError("invalid_json_line", f"the line is not JSON: {error}") from error
    if question.url != endpoint:
        raise _LineError(
            "mismatched_url",
            f"url: should be the batch's endpoint, {endpoint}, is {question.url!r}",
            "url",
        )
    return question.custom_id
