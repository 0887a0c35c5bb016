"""From a batch that was created to its output files.

Every batch has a task of its own, which goes through its states; whatever it needs to go on stands
in the store. Lines of all batches share the slots, in turn.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from functools import partial
from typing import Any, BinaryIO

from rankonce.serving.batches.batch_store import Batch, BatchStore, LineResult
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.batches.dispatch import Reply, Submit
from rankonce.serving.batches.file_store import FileStore
from rankonce.serving.batches.lines import Line, LineFault, check_lines, read_body
from rankonce.serving.batches.outputs import write_expired, write_outputs, write_result

logger = logging.getLogger(__name__)

# The server has too much to do, or is about to stop: nothing that a line could help, ...
_BUSY = (429, 503)
# ... unless it set itself a time that is too short: asked again for ever, it would keep its slot.
_TOO_SHORT = "deadline_exceeded"
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_SWEEP_S = 600.0
_READ_AHEAD = 64


class BatchWorker:
    """Runs every batch of a store that has not ended.

    Args:
        submit: answers one line.
        max_line_bytes: bound of a line.
    """

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        submit: Submit,
        config: BatchConfig,
        *,
        max_line_bytes: int,
    ) -> None:
        self._batches = batches
        self._files = files
        self._submit = submit
        self._config = config
        self._max_line_bytes = max_line_bytes
        self._slots = asyncio.Semaphore(config.max_lines_in_flight)
        # A check takes a core for seconds, so one at a time.
        self._checking = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._results: list[tuple[LineResult, asyncio.Future[None]]] = []
        self._has_results = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches inside this context, first those that an earlier server left."""
        await asyncio.to_thread(self._files.delete_leftovers)
        for batch_id in await asyncio.to_thread(self._batches.unfinished):
            logger.info("%s goes on", batch_id)
            self.start(batch_id)
        steady = [asyncio.create_task(self._write()), asyncio.create_task(self._sweep())]
        try:
            yield
        finally:
            # Lines under way have no result yet: the next server scores them.
            tasks = [*self._tasks.values(), *steady]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, batch_id: str) -> None:
        """Begin or go on with a batch."""
        self._cancelled[batch_id] = asyncio.Event()
        # A batch outlives the request that made it, and carries nothing of its context along.
        self._tasks[batch_id] = asyncio.create_task(self._run(batch_id), context=Context())

    def cancel(self, batch_id: str) -> None:
        """Tell a batch that the store has it cancelled."""
        if batch_id in self._cancelled:
            self._cancelled[batch_id].set()

    async def _run(self, batch_id: str) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._advance(batch_id)
                break
            except Exception:  # a full disk, say: the batch waits for better times
                task = asyncio.current_task()
                # A task group that fails while it is cancelled raises its failure alone.
                if task is None or task.cancelling():
                    raise
                logger.exception("%s stopped and goes on in %.1f s", batch_id, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        del self._tasks[batch_id], self._cancelled[batch_id]

    async def _advance(self, batch_id: str) -> None:
        batch = await asyncio.to_thread(self._batches.get, batch_id)
        if batch.status == "validating":
            await self._validate(batch)
            batch = await asyncio.to_thread(self._batches.get, batch_id)
        while batch.status == "in_progress":
            await self._score_lines(batch)
            if time.time() >= batch.expires_at:
                write = partial(write_expired, batch_id)
                await asyncio.to_thread(self._batches.expire, batch_id, write)
            else:
                await asyncio.to_thread(self._batches.begin_finalizing, batch_id)
            batch = await asyncio.to_thread(self._batches.get, batch_id)
        if batch.status in ("finalizing", "cancelling"):
            await asyncio.to_thread(write_outputs, batch, self._batches, self._files)
        await asyncio.to_thread(self._batches.drop_lines)

    async def _validate(self, batch: Batch) -> None:
        try:
            async with self._checking:
                lines, faults = await asyncio.to_thread(
                    check_lines,
                    self._files.path(batch.input_file_id),
                    endpoint=batch.endpoint,
                    max_lines=self._config.max_lines,
                    max_line_bytes=self._max_line_bytes,
                )
        except FileNotFoundError:
            lines, faults = [], [LineFault(code="no_file", message="the input file is gone")]
        if faults:
            await asyncio.to_thread(self._batches.fail, batch.id, faults)
        else:
            await asyncio.to_thread(self._batches.begin, batch.id, lines)

    async def _score_lines(self, batch: Batch) -> None:
        """Score lines until none is left or the batch is over; those under way end."""
        after = 0
        with self._files.path(batch.input_file_id).open("rb") as file:
            async with asyncio.TaskGroup() as scoring:
                while lines := await asyncio.to_thread(
                    self._batches.pending, batch.id, after=after, limit=_READ_AHEAD
                ):
                    for line in lines:
                        await self._slots.acquire()
                        if self._is_over(batch):
                            self._slots.release()
                            return
                        task = scoring.create_task(self._score(batch, file, line))
                        task.add_done_callback(lambda _: self._slots.release())
                    after = lines[-1].number

    async def _score(self, batch: Batch, file: BinaryIO, line: Line) -> None:
        body = await asyncio.to_thread(read_body, file, line)
        reply = await self._ask(batch, body)
        if reply is not None:
            await self._record(write_result(batch.id, line, reply))

    async def _ask(self, batch: Batch, body: Mapping[str, Any]) -> Reply | None:
        """Ask until the server has time; ``None`` when the batch is over before."""
        pause_s = _FIRST_PAUSE_S
        while _is_busy(reply := await self._submit(batch.endpoint, body, owner=batch.owner)):
            rest_s = max(0.0, batch.expires_at - time.time())
            try:
                async with asyncio.timeout(min(reply.retry_after_s or pause_s, rest_s)):
                    await self._cancelled[batch.id].wait()
            except TimeoutError:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._is_over(batch):
                return None
        return reply

    def _is_over(self, batch: Batch) -> bool:
        return self._cancelled[batch.id].is_set() or time.time() >= batch.expires_at

    async def _record(self, result: LineResult) -> None:
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._results.append((result, kept))
        self._has_results.set()
        await kept

    async def _write(self) -> None:
        """Keep results, those that come during one transaction in the next."""
        while True:
            await self._has_results.wait()
            self._has_results.clear()
            group, self._results = self._results, []
            try:
                await asyncio.to_thread(self._batches.record, [result for result, _ in group])
            except Exception as error:  # it belongs to the batches of these lines
                for _, kept in group:
                    if not kept.done():
                        kept.set_exception(error)
            else:
                for _, kept in group:
                    if not kept.done():
                        kept.set_result(None)

    async def _sweep(self) -> None:
        while True:
            try:
                num_deleted = await asyncio.to_thread(self._files.delete_expired)
                if num_deleted:
                    logger.info("deleted %d files whose time had passed", num_deleted)
            except Exception:  # the next sweep may do better
                logger.exception("expired files stay for now")
            await asyncio.sleep(_SWEEP_S)


def _is_busy(reply: Reply) -> bool:
    error = reply.body.get("error", {}) if isinstance(reply.body, dict) else {}
    return reply.status in _BUSY and error.get("code") != _TOO_SHORT
