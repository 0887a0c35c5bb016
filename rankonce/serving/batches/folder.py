"""The operator's folder, which one server at a time holds."""

import fcntl
import os
from pathlib import Path


class DataFolder:
    """The folder and what stands in it.

    Attributes:
        database: path of the database.
        files: contents by file id.
        partial: files that are being written; nothing in here counts.

    Args:
        path: is created where it is missing, readable by its owner alone: it holds what members
            wrote.

    Raises:
        OSError: it cannot be written, or another server holds it.
    """

    def __init__(self, path: Path) -> None:
        self.database = path / "batches.sqlite3"
        self.files = path / "files"
        self.partial = path / "partial"
        for folder in (path, self.files, self.partial):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # The system drops the lock with the process, however that ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OSError(error.errno, f"data folder {path}: another server uses it") from error

    def close(self) -> None:
        """Let another server have it."""
        os.close(self._lock)


def move_into_place(partial: Path, path: Path) -> None:
    """Give a file that is written its name, so that it is whole or absent after any crash."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
