"""Files and batches over one data folder."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rankonce.serving.batches.batch_store import Batch, BatchStore
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.batches.database import Database
from rankonce.serving.batches.dispatch import Submit
from rankonce.serving.batches.file_store import FileStore
from rankonce.serving.batches.folder import DataFolder
from rankonce.serving.batches.worker import BatchWorker

_DAY_S = 86_400


class BatchService:
    """What the routes use; it holds the folder until it has run.

    Args:
        submit: answers one line.
        max_line_bytes: bound of a line.

    Raises:
        OSError: the folder cannot be written, or another server holds it.
        DataError: a newer version wrote it.
    """

    def __init__(self, config: BatchConfig, submit: Submit, *, max_line_bytes: int) -> None:
        self.max_file_bytes = config.max_file_mb * 1_000_000
        self._folder = DataFolder(config.data_dir)
        try:
            self._database = Database(self._folder.database)
        except BaseException:
            self._folder.close()
            raise
        keep_s = config.keep_days * _DAY_S
        self.files = FileStore(self._database, self._folder, keep_s=keep_s)
        self.batches = BatchStore(self._database, keep_output_s=keep_s)
        self.worker = BatchWorker(
            self.batches, self.files, submit, config, max_line_bytes=max_line_bytes
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches inside this context, and close everything behind it."""
        try:
            async with self.worker.running():
                yield
        finally:
            self._database.close()
            self._folder.close()

    async def start(self, create: Callable[[], Batch | None]) -> Batch | None:
        """Create a batch and begin with it: both, even if its client goes away in between."""

        async def create_and_begin() -> Batch | None:
            batch = await asyncio.to_thread(create)
            if batch is not None:
                self.worker.start(batch.id)
            return batch

        return await asyncio.shield(create_and_begin())

    async def cancel(self, batch_id: str) -> bool:
        """Cancel a batch as ``BatchStore.cancel`` does, and tell it: both, as in ``start``."""

        async def cancel_and_tell() -> bool:
            is_cancelling = await asyncio.to_thread(self.batches.cancel, batch_id)
            if is_cancelling:
                self.worker.cancel(batch_id)
            return is_cancelling

        return await asyncio.shield(cancel_and_tell())
