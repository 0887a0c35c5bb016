"""Files of results: JSON lines and Parquet, both written so that a killed run can be resumed."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rankonce.errors import DataError
from rankonce.records import ScoreResult

# A part of a Parquet file is written when it holds this many candidates: what a kill can lose.
_CANDIDATES_A_PART = 20_000


class ResultFile(Protocol):
    """Where results go, in the order of their lines.

    Attributes:
        last_line: line number of the last result that the file held when it was opened, 0 if none.
        num_results: how many it held then.
    """

    last_line: int
    num_results: int

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one result."""

    def flush(self) -> None:
        """Hand what was written to the operating system, as far as the format allows."""

    def finish(self) -> None:
        """Complete the file after the last result."""

    def close(self) -> None:
        """Let go of the file, finished or not."""


def open_results(path: Path | None, *, resume: bool) -> ResultFile:
    """Open the results for writing.

    Args:
        path: Parquet by its suffix, else JSON lines; ``None`` is stdout.
        resume: go on after what the file holds, instead of starting it anew.
    """
    if path is None:
        return JsonLinesResults(sys.stdout.buffer)
    if path.suffix.lower() == ".parquet":
        return ParquetResults(path, resume=resume)
    num_results, last_line = mend_json_lines(path) if resume else (0, 0)
    file = path.open("ab" if resume else "wb")
    return JsonLinesResults(file, num_results=num_results, last_line=last_line)


def _probabilities(log_probs: Mapping[str, float]) -> dict[str, float]:
    return {label: math.exp(log_prob) for label, log_prob in log_probs.items()}


def result_record(line: int, result: ScoreResult) -> dict[str, Any]:
    """Write a result as plain data.

    Args:
        line: number of the request's line or row in its file.
    """
    return {
        "line": line,
        "id": result.id,
        "task": result.task,
        "adapter": result.adapter,
        "calibration": result.calibration,
        "candidates": [
            {
                "id": candidate.id,
                "rank": candidate.rank,
                "value": candidate.value,
                "raw_value": (
                    candidate.value if candidate.raw_value is None else candidate.raw_value
                ),
                "log_probs": dict(candidate.log_probs),
                "probabilities": _probabilities(candidate.log_probs),
                "raw_probabilities": (
                    None
                    if candidate.raw_log_probs is None
                    else _probabilities(candidate.raw_log_probs)
                ),
                **({} if candidate.label_mass is None else {"label_mass": candidate.label_mass}),
            }
            for candidate in result.candidates
        ],
        "history": {
            "policy": result.history.policy,
            "num_events": result.history.num_events,
            "num_kept": result.history.num_kept,
            "dropped": [
                {"event": event, "reason": reason}
                for event, reason in result.history.dropped.items()
            ],
        },
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "computed_tokens": result.usage.computed_tokens,
            "cached_tokens": result.usage.cached_tokens,
            "separate_tokens": result.usage.separate_tokens,
        },
        "distinct_score_ratio": result.distinct_score_ratio,
        "warnings": list(result.warnings),
    }


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Write one line of JSON."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair has no UTF-8; as an escape it is JSON and comes back as it was.
    return text.encode("utf-8", "backslashreplace") + b"\n"


class JsonLinesResults:
    """Results as JSON lines; see ``ResultFile``."""

    def __init__(self, file: BinaryIO, *, num_results: int = 0, last_line: int = 0) -> None:
        self.num_results = num_results
        self.last_line = last_line
        self._file = file

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one result."""
        self._file.write(encode_record(record))

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def finish(self) -> None:
        """Hand the last lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file; stdout stays open."""
        if self._file is not sys.stdout.buffer:
            self._file.close()


def mend_json_lines(path: Path, *, last: int | None = None) -> tuple[int, int]:
    """Cut off a torn last line, and lines past a number.

    Args:
        last: the last ``line`` that may stay; any by default.

    Returns:
        How many lines the file holds now and the ``line`` of the last one.

    Raises:
        DataError: a line is complete but has no ``line``: the file is not ours to resume.
    """
    if not path.exists():
        return 0, 0
    count, last_line, end = 0, 0, 0
    with path.open("r+b") as file:
        for content in file:
            if not content.endswith(b"\n"):
                break
            number = _line_number(content, path, count + 1)
            if last is not None and number > last:
                break
            count, last_line, end = count + 1, number, end + len(content)
        file.truncate(end)
    return count, last_line


def _line_number(content: bytes, path: Path, place: int) -> int:
    # Every record begins with its line; decoding the rest would make resuming slow.
    match = re.match(rb'\{"line": (\d+),', content)
    if match is None:
        raise DataError(f"{path}: line {place} was not written by rankonce score")
    return int(match[1])


class ParquetResults:
    """Results as Parquet; see ``ResultFile``.

    A Parquet file cannot be continued, so numbered parts are written to ``FILE.parts/`` and merged
    at the end.

    Args:
        path: the file.
        resume: keep what is there: parts of a run that did not end, or the file of one that did.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._folder = path.with_name(path.name + ".parts")
        self._rows: list[dict[str, Any]] = []
        self._num_candidates = 0
        if path.exists():
            # The merged file appears at once and whole, so parts beside it are in it already.
            shutil.rmtree(self._folder, ignore_errors=True)
        if not resume:
            path.unlink(missing_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, self._part(0))
        self.num_results, self.last_line = self._count()

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one result."""
        self._rows.append({**record, "candidates": [_row(one) for one in record["candidates"]]})
        self._num_candidates += len(record["candidates"])
        if self._num_candidates >= _CANDIDATES_A_PART:
            self._write_part()

    def flush(self) -> None:
        """Do nothing: a part is written when it is full."""

    def finish(self) -> None:
        """Write the last part and merge all into the file."""
        from pyarrow.parquet import ParquetFile, ParquetWriter

        if self._rows:
            self._write_part()
        merged = self._folder / "merged.tmp"
        with ParquetWriter(merged, _schema()) as writer:
            for part in self._parts():
                for batch in ParquetFile(part).iter_batches():
                    writer.write_batch(batch)
        os.replace(merged, self._path)
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Nothing stays open between parts."""

    def _write_part(self) -> None:
        import pyarrow as pa
        from pyarrow.parquet import write_table

        parts = self._parts()
        number = int(parts[-1].stem) + 1 if parts else 1
        unfinished = self._folder / "part.tmp"
        write_table(pa.Table.from_pylist(self._rows, schema=_schema()), unfinished)
        os.replace(unfinished, self._part(number))
        self._rows, self._num_candidates = [], 0

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:08d}.parquet"

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))

    def _count(self) -> tuple[int, int]:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table

        count, last_line = 0, 0
        for part in self._parts():
            try:
                lines = read_table(part, columns=["line"])["line"].to_pylist()
            except (ArrowException, KeyError) as error:
                raise DataError(f"{part} was not written by rankonce score: {error}") from error
            count += len(lines)
            last_line = lines[-1] if lines else last_line
        return count, last_line


def _row(candidate: Mapping[str, Any]) -> dict[str, Any]:
    maps = ("log_probs", "probabilities", "raw_probabilities")
    return {
        **candidate,
        **{name: list(candidate[name].items()) for name in maps if candidate[name] is not None},
    }


def _schema() -> Any:
    import pyarrow as pa

    by_label = pa.map_(pa.string(), pa.float64())
    candidate = pa.struct(
        {
            "id": pa.string(),
            "rank": pa.int64(),
            "value": pa.float64(),
            "log_probs": by_label,
            "probabilities": by_label,
            "label_mass": pa.float64(),
            "raw_value": pa.float64(),
            "raw_probabilities": by_label,
        }
    )
    dropped = pa.struct({"event": pa.int64(), "reason": pa.string()})
    counts = ("prompt_tokens", "computed_tokens", "cached_tokens", "separate_tokens")
    return pa.schema(
        {
            "line": pa.int64(),
            "id": pa.string(),
            "task": pa.string(),
            "adapter": pa.string(),
            "calibration": pa.string(),
            "candidates": pa.list_(candidate),
            "history": pa.struct(
                {
                    "policy": pa.string(),
                    "num_events": pa.int64(),
                    "num_kept": pa.int64(),
                    "dropped": pa.list_(dropped),
                }
            ),
            "usage": pa.struct({name: pa.int64() for name in counts}),
            "distinct_score_ratio": pa.float64(),
            "warnings": pa.list_(pa.string()),
        }
    )


class RejectFile:
    """Lines that could not be scored, as JSON lines; the file appears with the first of them.

    Args:
        path: the file.
        last: keep what the file says of lines up to this one; 0 starts it anew.
    """

    def __init__(self, path: Path, *, last: int = 0) -> None:
        self._path = path
        self.num_before = 0
        if last:
            self.num_before, _ = mend_json_lines(path, last=last)
        else:
            path.unlink(missing_ok=True)

    def write(self, line: int, reason: str, text: str) -> None:
        """Add a line, and hand it to the operating system before anything later is written."""
        record = {"line": line, "reason": reason, "input": text}
        with self._path.open("ab") as file:
            file.write(encode_record(record))
