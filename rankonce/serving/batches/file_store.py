"""Files: a row in the database and a content in the data folder."""

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from sqlite3 import Connection, Row
from typing import Literal

from rankonce.serving.batches.database import Database
from rankonce.serving.batches.folder import DataFolder, move_into_place

Purpose = Literal["batch", "batch_output"]
# As SQL writes it, too.
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_IS_READ = (
    f"EXISTS (SELECT 1 FROM batches WHERE input_file_id = files.id AND status IN {UNFINISHED})"
)
# Nothing else in the folder is ever deleted.
_CONTENT_NAME = re.compile(r"file-[0-9a-f]{32}(-output|-error)?")


class FileInUseError(Exception):
    """A file that a batch still reads."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file's row; times are Unix seconds."""

    id: str
    owner: str
    purpose: Purpose
    filename: str
    num_bytes: int
    created_at: int
    expires_at: int


_COLUMNS = ", ".join(field.name for field in fields(StoredFile))


class FileStore:
    """The files of every owner.

    Args:
        keep_s: how long a file is kept where nobody says, seconds.
    """

    def __init__(self, database: Database, folder: DataFolder, *, keep_s: int) -> None:
        self._database = database
        self._folder = folder
        self._keep_s = keep_s

    def path(self, file_id: str) -> Path:
        """Return where the content of a file stands; the id is one of the store's own."""
        return self._folder.files / file_id

    def new_partial(self) -> Path:
        """Return a path for a content that is being written."""
        return self._folder.partial / uuid.uuid4().hex

    def add(
        self, partial: Path, *, owner: str, filename: str, keep_s: int | None = None
    ) -> StoredFile:
        """Take an uploaded content that is written whole."""
        now = int(time.time())
        stored = StoredFile(
            id=f"file-{uuid.uuid4().hex}",
            owner=owner,
            purpose="batch",
            filename=filename,
            num_bytes=partial.stat().st_size,
            created_at=now,
            expires_at=now + (self._keep_s if keep_s is None else keep_s),
        )
        move_into_place(partial, self.path(stored.id))
        with self._database.transaction() as connection:
            insert_file(connection, stored)
        return stored

    def find(self, file_id: str, *, owner: str) -> StoredFile | None:
        """Find a file of this owner."""
        with self._database.transaction() as connection:
            return find_file(connection, file_id, owner=owner)

    def page(
        self,
        *,
        owner: str,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> list[StoredFile] | None:
        """List an owner's files after one of them.

        Returns:
            Up to ``limit + 1`` files, the last of them for the next page; ``None`` where the owner
            has no file ``after``.
        """
        with self._database.transaction() as connection:
            rows = select_page(
                connection,
                "files",
                owner=owner,
                limit=limit,
                after=after,
                newest_first=newest_first,
                where="expires_at > :now AND (:purpose IS NULL OR purpose = :purpose)",
                values={"now": int(time.time()), "purpose": purpose},
            )
        return None if rows is None else [_read(row) for row in rows]

    def delete(self, file_id: str, *, owner: str) -> bool:
        """Delete a file of this owner.

        Returns:
            Whether there was one.

        Raises:
            FileInUseError: a batch that has not ended reads it.
        """
        with self._database.transaction() as connection:
            if find_file(connection, file_id, owner=owner) is None:
                return False
            found = connection.execute(
                f"DELETE FROM files WHERE id = ? AND NOT {_IS_READ}", (file_id,)
            )
            if not found.rowcount:
                raise FileInUseError
        self._unlink([file_id])
        return True

    def delete_expired(self) -> int:
        """Delete every file whose time has passed, unless a batch still reads it."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"DELETE FROM files WHERE expires_at <= ? AND NOT {_IS_READ} RETURNING id",
                (int(time.time()),),
            ).fetchall()
        self._unlink(row["id"] for row in rows)
        return len(rows)

    def delete_leftovers(self) -> None:
        """Delete contents that a server was killed over; nothing else may be at work."""
        for path in self._folder.partial.iterdir():
            path.unlink()
        with self._database.transaction() as connection:
            known = {row["id"] for row in connection.execute("SELECT id FROM files")}
        for path in self._folder.files.iterdir():
            if path.name not in known and _CONTENT_NAME.fullmatch(path.name):
                path.unlink()

    def _unlink(self, file_ids: Iterable[str]) -> None:
        for file_id in file_ids:
            self.path(file_id).unlink(missing_ok=True)


def insert_file(connection: Connection, stored: StoredFile) -> None:
    """Write a row inside a transaction."""
    places = ", ".join("?" for _ in fields(StoredFile))
    connection.execute(f"INSERT INTO files ({_COLUMNS}) VALUES ({places})", astuple(stored))


def find_file(connection: Connection, file_id: str, *, owner: str) -> StoredFile | None:
    """Find a file of this owner inside a transaction."""
    row = connection.execute(
        "SELECT * FROM files WHERE id = ? AND owner = ? AND expires_at > ?",
        (file_id, owner, int(time.time())),
    ).fetchone()
    return None if row is None else _read(row)


def select_page(
    connection: Connection,
    table: Literal["files", "batches"],
    *,
    owner: str,
    limit: int,
    after: str | None,
    newest_first: bool = True,
    where: str = "TRUE",
    values: dict[str, object] | None = None,
) -> Sequence[Row] | None:
    """Select an owner's rows after one of them, one more than asked for.

    Returns:
        ``None`` where the owner has no row ``after``.
    """
    bound = ""
    values = {**(values or {}), "owner": owner, "limit": limit + 1}
    if after is not None:
        row = connection.execute(
            f"SELECT seq FROM {table} WHERE id = ? AND owner = ?", (after, owner)
        ).fetchone()
        if row is None:
            return None
        bound = f"AND seq {'<' if newest_first else '>'} :seq"
        values["seq"] = row["seq"]
    order = "DESC" if newest_first else "ASC"
    return connection.execute(
        f"SELECT * FROM {table} WHERE owner = :owner AND {where} {bound} "
        f"ORDER BY seq {order} LIMIT :limit",
        values,
    ).fetchall()


def _read(row: Row) -> StoredFile:
    return StoredFile(**{field.name: row[field.name] for field in fields(StoredFile)})
