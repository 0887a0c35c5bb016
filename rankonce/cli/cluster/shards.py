"""A run in shards: what each of them reads, where it is written, and what it belongs to.

Every shard is a stretch of the input and a file of the output folder. It is written under
``unfinished/`` and renamed when it is whole, so that what has its name is done: a run goes on with
the shards that are missing, and one that was computed twice is there once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from rankonce.cli.request_files import (
    ROWS_AT_ONCE,
    RequestLine,
    is_parquet,
    open_parquet,
    read_json_lines,
    read_rows,
)
from rankonce.errors import DataError

_MANIFEST = "manifest.json"
_UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A stretch of the input.

    Attributes:
        index: its place among the shards.
        first: 1-based number of its first line or row.
        num_lines: lines or rows that it has, blank lines as well.
        offset, num_bytes: where its JSON lines stand; 0 for rows.
    """

    index: int
    first: int
    num_lines: int
    offset: int = 0
    num_bytes: int = 0

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"shard-{self.index:06d}"

    @property
    def last(self) -> int:
        """Number of its last line or row."""
        return self.first + self.num_lines - 1


def plan_shards(path: Path, *, shard_rows: int) -> tuple[list[Shard], str]:
    """Cut a file of requests into shards; also its SHA-256."""
    shards: list[Shard] = []
    if is_parquet(path):
        num_rows = open_parquet(path).metadata.num_rows
        for start in range(0, num_rows, shard_rows):
            num_lines = min(shard_rows, num_rows - start)
            shards.append(Shard(index=len(shards), first=start + 1, num_lines=num_lines))
        with path.open("rb") as file:
            return shards, hashlib.file_digest(file, "sha256").hexdigest()
    hashed, offset, first = hashlib.sha256(), 0, 1
    with path.open("rb") as file:
        while lines := [*islice(file, shard_rows)]:
            content = b"".join(lines)
            hashed.update(content)
            shards.append(
                Shard(
                    index=len(shards),
                    first=first,
                    num_lines=len(lines),
                    offset=offset,
                    num_bytes=len(content),
                )
            )
            offset, first = offset + len(content), first + len(lines)
    return shards, hashed.hexdigest()


def read_shard(path: Path, shard: Shard) -> bytes:
    """Read what a shard has: JSON lines as they stand, rows as a stream of Arrow's.

    Raises:
        RequestError: the file is not what it was planned from.
        OSError: there is no such file here.
    """
    if is_parquet(path):
        return _read_parquet_shard(path, shard)
    with path.open("rb") as file:
        file.seek(shard.offset)
        return file.read(shard.num_bytes)


def shard_lines(content: bytes, shard: Shard, path: Path) -> Iterator[RequestLine]:
    """Read the requests in what ``read_shard`` gave, numbered as in their file."""
    if not is_parquet(path):
        return read_json_lines(BytesIO(content), first=shard.first)
    import pyarrow as pa

    return read_rows(pa.ipc.open_stream(content), path=path, first=shard.first)


def _read_parquet_shard(path: Path, shard: Shard) -> bytes:
    import pyarrow as pa

    file = open_parquet(path)
    groups, skipped, start = [], 0, 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if end < shard.first:
            skipped = end
        elif start < shard.last:
            groups.append(group)
        start = end
    # Only the row groups that the shard touches are decoded, a few rows at a time.
    skip, left = shard.first - 1 - skipped, shard.num_lines
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, file.schema_arrow) as writer:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups):
            part = batch.slice(skip, left)
            skip, left = max(0, skip - batch.num_rows), left - part.num_rows
            if part.num_rows:
                writer.write_batch(part)
            if not left:
                break
    return bytes(sink.getvalue())


class ShardFolder:
    """The output of a run in shards.

    Args:
        path: the folder.
        suffix: of its results, ``.jsonl`` or ``.parquet``.
    """

    def __init__(self, path: Path, *, suffix: str) -> None:
        self.path = path
        self.suffix = suffix

    def begin(self, manifest: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or see that what it holds belongs to this run.

        Args:
            manifest: what decides the results; a run that is resumed has the same.
            resume: whether it may hold shards.

        Raises:
            DataError: it holds something else.
        """
        path = self.path / _MANIFEST
        if not path.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise DataError(f"--out: {self.path} holds no run, and is not empty")
            self.path.mkdir(parents=True, exist_ok=True)
            unfinished = self.path / f"{_MANIFEST}.tmp"
            unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        elif not resume:
            raise DataError(
                f"--out: {self.path} holds a run; --resume goes on with it, another folder "
                "starts anew"
            )
        _compare(json.loads(path.read_text(encoding="utf-8")), manifest, self.path)
        # What workers of a run that was killed left behind.
        shutil.rmtree(self.path / _UNFINISHED, ignore_errors=True)
        (self.path / _UNFINISHED).mkdir()

    def finish(self) -> None:
        """Remove what workers that died left behind."""
        shutil.rmtree(self.path / _UNFINISHED, ignore_errors=True)

    def results(self, shard: Shard) -> Path:
        """Where a finished shard is."""
        return self.path / f"{shard.name}{self.suffix}"

    def rejects(self, shard: Shard) -> Path:
        """Where the lines of a shard that cannot be scored are, if it has any."""
        return self.path / f"{shard.name}.rejects.jsonl"

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard is finished."""
        return self.results(shard).exists()

    def attempts(self, shard: Shard) -> int:
        """How many workers have begun a shard and not finished it."""
        begun = (self.path / _UNFINISHED).glob(f"{shard.name}.*")
        return len({path.name.split(".")[1] for path in begun})

    def attempt(self, shard: Shard) -> tuple[Path, Path]:
        """Name the files that this process writes results and rejects to."""
        # Two workers may have the same shard for a while: one that Ray took for dead goes on.
        stem = self.path / _UNFINISHED / f"{shard.name}.{os.getpid()}-{uuid4().hex}"
        return Path(f"{stem}{self.suffix}"), Path(f"{stem}.rejects.jsonl")

    def publish(self, shard: Shard, results: Path, rejects: Path) -> None:
        """Give a whole shard its name, the rejects first: who sees the results sees both."""
        if rejects.exists():
            _publish(rejects, self.rejects(shard))
        _publish(results, self.results(shard))


def _publish(unfinished: Path, path: Path) -> None:
    # The content has to be on disk before the name is: a machine may lose its power between them.
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise DataError(
                f"--resume: {folder} holds shards of another run: {name} was "
                f"{json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
            )
