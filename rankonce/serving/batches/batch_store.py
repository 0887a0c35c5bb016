"""Batches and their lines: every step is one transaction, so that any crash leaves a whole one."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from sqlite3 import Connection, Row
from typing import Literal

from rankonce.serving.batches.database import Database
from rankonce.serving.batches.file_store import (
    UNFINISHED,
    StoredFile,
    find_file,
    insert_file,
    select_page,
)
from rankonce.serving.batches.lines import Line, LineFault

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
# Rows of one transaction: others wait for the connection meanwhile.
_CHUNK = 500


class CountError(Exception):
    """Output files that do not hold what the batch counts."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch's row; times are Unix seconds.

    Attributes:
        metadata: JSON of an object, or ``None``.
        errors: JSON of a list of ``LineFault``, or ``None``.
        keep_output_s: how long its output files are kept.
        num_failed: lines in the error file.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    keep_output_s: int
    status: Status
    errors: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    num_lines: int
    num_completed: int
    num_failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class LineResult:
    """What became of one line.

    Attributes:
        failed: whether it belongs into the error file.
        text: the line of the output or error file, JSON.
    """

    batch_id: str
    number: int
    failed: bool
    text: str
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class BatchStore:
    """The batches of every owner.

    Args:
        keep_output_s: how long output files are kept where nobody says, seconds.
    """

    def __init__(self, database: Database, *, keep_output_s: int) -> None:
        self._database = database
        self._keep_output_s = keep_output_s

    def create(
        self,
        *,
        owner: str,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: int,
        metadata: Mapping[str, str] | None = None,
        keep_output_s: int | None = None,
    ) -> Batch | None:
        """Create a batch over an uploaded file of its owner.

        Returns:
            ``None`` where the owner has no such file.
        """
        now = int(time.time())
        batch_id = f"batch_{uuid.uuid4().hex}"
        values = {
            "id": batch_id,
            "owner": owner,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "metadata": None if metadata is None else json.dumps(metadata),
            "keep_output_s": self._keep_output_s if keep_output_s is None else keep_output_s,
            "status": "validating",
            "created_at": now,
            "expires_at": now + window_s,
        }
        with self._database.transaction() as connection:
            file = find_file(connection, input_file_id, owner=owner)
            if file is None or file.purpose != "batch":
                return None
            connection.execute(
                f"INSERT INTO batches ({', '.join(values)}) "
                f"VALUES ({', '.join(f':{name}' for name in values)})",
                values,
            )
            return _get(connection, batch_id)

    def get(self, batch_id: str) -> Batch:
        """Read a batch, whoever owns it."""
        with self._database.transaction() as connection:
            return _get(connection, batch_id)

    def find(self, batch_id: str, *, owner: str) -> Batch | None:
        """Find a batch of this owner."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT * FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)
            ).fetchone()
        return None if row is None else _read(row)

    def page(self, *, owner: str, limit: int, after: str | None = None) -> list[Batch] | None:
        """List an owner's batches, newest first; answers as ``FileStore.page`` does."""
        with self._database.transaction() as connection:
            rows = select_page(connection, "batches", owner=owner, limit=limit, after=after)
        return None if rows is None else [_read(row) for row in rows]

    def unfinished(self) -> list[str]:
        """List the ids of every batch that has not ended, oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT id FROM batches WHERE status IN {UNFINISHED} ORDER BY seq"
            ).fetchall()
        return [row["id"] for row in rows]

    def begin(self, batch_id: str, lines: Sequence[Line]) -> None:
        """Take the lines of a batch that was validated; one that is being cancelled gets none."""
        with self._database.transaction() as connection:
            started = connection.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ?, num_lines = ? "
                "WHERE id = ? AND status = 'validating'",
                (int(time.time()), len(lines), batch_id),
            )
            if started.rowcount:
                connection.executemany(
                    "INSERT INTO lines (batch_id, number, custom_id, start, num_bytes) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (
                        (batch_id, line.number, line.custom_id, line.start, line.num_bytes)
                        for line in lines
                    ),
                )

    def fail(self, batch_id: str, faults: Sequence[LineFault]) -> None:
        """End a batch whose input file has faults."""
        errors = json.dumps([fault.model_dump() for fault in faults])
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ? "
                "WHERE id = ? AND status = 'validating'",
                (int(time.time()), errors, batch_id),
            )

    def cancel(self, batch_id: str) -> bool:
        """Begin to cancel a batch.

        Returns:
            Whether it is being cancelled; one that is being finalised or has ended is not.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
                "WHERE id = ? AND status IN ('validating', 'in_progress')",
                (int(time.time()), batch_id),
            )
            return _get(connection, batch_id).status == "cancelling"

    def pending(self, batch_id: str, *, after: int, limit: int) -> list[Line]:
        """Read lines without a result, those behind line ``after``."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT number, custom_id, start, num_bytes FROM lines "
                "WHERE batch_id = ? AND number > ? AND result IS NULL ORDER BY number LIMIT ?",
                (batch_id, after, limit),
            ).fetchall()
        return [Line(**dict(row)) for row in rows]

    def record(self, results: Sequence[LineResult]) -> None:
        """Keep results: one a line, whichever is the first, and none once its batch has ended."""
        with self._database.transaction() as connection:
            for result in results:
                _record(connection, result)

    def begin_finalizing(self, batch_id: str) -> None:
        """Leave ``in_progress`` if every line has its result."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE batches SET status = 'finalizing', finalizing_at = ? "
                "WHERE id = ? AND status = 'in_progress' AND NOT EXISTS "
                "(SELECT 1 FROM lines WHERE batch_id = batches.id AND result IS NULL)",
                (int(time.time()), batch_id),
            )

    def expire(self, batch_id: str, write: Callable[[Line], LineResult]) -> None:
        """Leave ``in_progress`` when the window is over.

        Args:
            write: makes the result of a line that was not scored.
        """
        now = int(time.time())
        with self._database.transaction() as connection:
            if _get(connection, batch_id).status != "in_progress":
                return
            rows = connection.execute(
                "SELECT number, custom_id, start, num_bytes FROM lines "
                "WHERE batch_id = ? AND result IS NULL",
                (batch_id,),
            ).fetchall()
            for row in rows:
                _record(connection, write(Line(**dict(row))))
            connection.execute(
                "UPDATE batches SET status = 'finalizing', finalizing_at = ?, expired_at = ? "
                "WHERE id = ?",
                (now, now if rows else None, batch_id),
            )

    def results(self, batch_id: str, *, failed: bool) -> Iterator[str]:
        """Read the results in the order of the lines."""
        after = 0
        while True:
            with self._database.transaction() as connection:
                rows = connection.execute(
                    "SELECT number, result FROM lines "
                    "WHERE batch_id = ? AND number > ? AND failed = ? ORDER BY number LIMIT ?",
                    (batch_id, after, failed, _CHUNK),
                ).fetchall()
            if not rows:
                return
            yield from (row["result"] for row in rows)
            after = rows[-1]["number"]

    def finish(
        self,
        batch_id: str,
        *,
        output: StoredFile | None,
        error: StoredFile | None,
        num_completed: int,
        num_failed: int,
    ) -> None:
        """End a batch with its output files, which are in their places.

        Args:
            num_completed: lines of the output file.
            num_failed: lines of the error file.

        Raises:
            CountError: a result came after the files were written.
        """
        with self._database.transaction() as connection:
            batch = _get(connection, batch_id)
            if (batch.num_completed, batch.num_failed) != (num_completed, num_failed):
                raise CountError(
                    f"{batch_id}: the files hold {num_completed} and {num_failed} lines, "
                    f"the batch counts {batch.num_completed} and {batch.num_failed}"
                )
            for file in (output, error):
                if file is not None:
                    insert_file(connection, file)
            if batch.status == "cancelling":
                status = "cancelled"
            else:
                status = "expired" if batch.expired_at is not None else "completed"
            # What expired has its time already.
            connection.execute(
                f"UPDATE batches SET status = ?, output_file_id = ?, error_file_id = ?, "
                f"{status}_at = coalesce({status}_at, ?) WHERE id = ?",
                (
                    status,
                    None if output is None else output.id,
                    None if error is None else error.id,
                    int(time.time()),
                    batch_id,
                ),
            )

    def drop_lines(self) -> None:
        """Delete the lines of batches that have ended."""
        while True:
            with self._database.transaction() as connection:
                deleted = connection.execute(
                    "DELETE FROM lines WHERE rowid IN (SELECT lines.rowid FROM lines "
                    "JOIN batches ON batches.id = batch_id "
                    f"WHERE status NOT IN {UNFINISHED} LIMIT ?)",
                    (_CHUNK,),
                )
            if not deleted.rowcount:
                return


def _get(connection: Connection, batch_id: str) -> Batch:
    return _read(connection.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone())


def _read(row: Row) -> Batch:
    return Batch(**{field.name: row[field.name] for field in fields(Batch)})


def _record(connection: Connection, result: LineResult) -> None:
    first = connection.execute(
        "UPDATE lines SET failed = ?, result = ? WHERE batch_id = ? AND number = ? "
        "AND result IS NULL AND EXISTS (SELECT 1 FROM batches "
        "WHERE id = batch_id AND status IN ('in_progress', 'cancelling'))",
        (result.failed, result.text, result.batch_id, result.number),
    )
    if first.rowcount:
        connection.execute(
            "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ?, "
            "input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?, "
            "output_tokens = output_tokens + ? WHERE id = ?",
            (
                not result.failed,
                result.failed,
                result.input_tokens,
                result.cached_tokens,
                result.output_tokens,
                result.batch_id,
            ),
        )
