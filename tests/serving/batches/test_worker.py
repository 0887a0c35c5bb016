"""The worker over a real store, with answers made here: when, how often and in what order."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from rankonce.serving.batches.batch_store import Batch, BatchStore, LineResult
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.batches.dispatch import Reply, Submit
from rankonce.serving.batches.outputs import write_outputs
from rankonce.serving.batches.service import BatchService
from tests.serving.batches.conftest import ENDED, line

URL = "/v1/rank"


async def echo(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
    """Answer the question itself; every third one is refused."""
    await asyncio.sleep(0)
    return Reply(status=400 if body["n"] % 3 == 2 else 200, body={"n": body["n"]})


@asynccontextmanager
async def running(folder: Path, submit: Submit, *, slots: int = 3) -> AsyncIterator[BatchService]:
    config = BatchConfig(data_dir=folder, max_lines_in_flight=slots)
    service = BatchService(config, submit, max_line_bytes=1000)
    async with service.running():
        yield service


def create(service: BatchService, num_lines: int, *, window_s: int = 60, owner: str = "") -> str:
    partial = service.files.new_partial()
    partial.write_text(
        "".join(f"{json.dumps(line(f'line-{n}', URL, {'n': n}))}\n" for n in range(num_lines))
    )
    file = service.files.add(partial, owner=owner, filename="lines.jsonl")
    batch = service.batches.create(
        owner=owner,
        endpoint=URL,
        input_file_id=file.id,
        completion_window=f"{window_s}s",
        window_s=window_s,
    )
    assert batch is not None
    return batch.id


async def wait(service: BatchService, batch_id: str) -> Batch:
    async with asyncio.timeout(30):
        while (batch := service.batches.get(batch_id)).status not in ENDED:
            await asyncio.sleep(0.01)
    return batch


def numbers(service: BatchService, file_id: str | None) -> list[int]:
    """What was answered, as the output or error file has it."""
    if file_id is None:
        return []
    parts = [json.loads(text) for text in service.files.path(file_id).read_text().splitlines()]
    assert [part["custom_id"] for part in parts] == [
        f"line-{part['response']['body']['n']}" for part in parts
    ]
    return [part["response"]["body"]["n"] for part in parts]


def fail_from(service: BatchService, transaction: int) -> Callable[[], int]:
    """Let nothing reach the database from one transaction on; returns a count of them."""
    begin, count = service.batches._database.transaction, 0

    def count_and_begin() -> Any:
        nonlocal count
        count += 1
        if count >= transaction:
            raise OSError("the disk is gone")
        return begin()

    service.batches._database.transaction = count_and_begin  # type: ignore[method-assign]
    return lambda: count


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_crash_before_any_transaction_changes_no_output(
    tmp_path: Path, is_cancelled: bool
) -> None:
    num_lines = 7

    async def crash_and_resume(folder: Path, transaction: int) -> int:
        async with running(folder, echo) as service:
            batch_id = create(service, num_lines)
            if is_cancelled:
                assert service.batches.cancel(batch_id)
            count = fail_from(service, transaction)
            service.worker.start(batch_id)
            async with asyncio.timeout(30):
                while count() < transaction and service.worker._tasks:
                    await asyncio.sleep(0.001)
        async with running(folder, echo) as service:
            batch = await wait(service, batch_id)
            output, error = (
                numbers(service, i) for i in (batch.output_file_id, batch.error_file_id)
            )
            if is_cancelled:
                assert batch.status == "cancelled"
                assert output + error == []
            else:
                assert batch.status == "completed"
                assert (output, error) == ([0, 1, 3, 4, 6], [2, 5])
            assert (batch.num_completed, batch.num_failed) == (len(output), len(error))
            files = service.files.page(owner="", limit=9)
            assert files is not None
            on_disk = {path.name for path in (folder / "files").iterdir()}
            assert on_disk == {file.id for file in files}
            assert len(files) == (1 if is_cancelled else 3)
        assert list((folder / "partial").iterdir()) == []
        return count()

    transaction, num_crashes = 1, 0
    while asyncio.run(crash_and_resume(tmp_path / str(transaction), transaction)) >= transaction:
        num_crashes += 1
        transaction += 1
    assert num_crashes >= (5 if is_cancelled else 12)


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    asked: Counter[int] = Counter()

    async def submit(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        asked[body["n"]] += 1
        if asked[body["n"]] < 3:
            status = (429, 503)[asked[body["n"]] - 1]
            return Reply(status=status, body={"error": {}}, retry_after_s=0.01)
        return await echo(path, body, owner=owner)

    async def scenario() -> None:
        async with running(tmp_path, submit) as service:
            batch_id = create(service, 5)
            service.worker.start(batch_id)
            batch = await wait(service, batch_id)
            assert numbers(service, batch.output_file_id) == [0, 1, 3, 4]
            assert numbers(service, batch.error_file_id) == [2]

    asyncio.run(scenario())
    assert set(asked.values()) == {3}


def test_lines_are_asked_for_their_owner_and_outside_of_any_request(tmp_path: Path) -> None:
    request = ContextVar("request", default="none")
    seen: set[tuple[str, str]] = set()

    async def submit(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        seen.add((owner, request.get()))
        return await echo(path, body, owner=owner)

    async def scenario() -> None:
        async with running(tmp_path, submit) as service:
            request.set("the one that created the batches")
            for owner in ("ann", "ben"):
                batch_id = create(service, 2, owner=owner)
                service.worker.start(batch_id)
                await wait(service, batch_id)

    asyncio.run(scenario())
    assert seen == {("ann", "none"), ("ben", "none")}


def test_a_line_with_too_short_a_time_fails_alone(tmp_path: Path) -> None:
    asked: Counter[int] = Counter()

    async def submit(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        asked[body["n"]] += 1
        if body["n"] == 1:
            fault = {"error": {"code": "deadline_exceeded"}, "n": 1}
            return Reply(status=503, body=fault, retry_after_s=0.01)
        return await echo(path, body, owner=owner)

    async def scenario() -> None:
        async with running(tmp_path, submit, slots=1) as service:
            batch_id = create(service, 4)
            service.worker.start(batch_id)
            batch = await wait(service, batch_id)
            assert numbers(service, batch.output_file_id) == [0, 3]
            assert numbers(service, batch.error_file_id) == [1, 2]

    asyncio.run(scenario())
    assert asked == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_a_batch_that_waits_for_a_busy_server_can_end(tmp_path: Path, status: str) -> None:
    async def submit(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        if body["n"] == 3:
            return Reply(status=503, body={"error": {}}, retry_after_s=600)
        return await echo(path, body, owner=owner)

    async def scenario() -> None:
        async with running(tmp_path, submit) as service:
            batch_id = create(service, 4, window_s=60 if status == "cancelled" else 1)
            service.worker.start(batch_id)
            async with asyncio.timeout(30):
                while service.batches.get(batch_id).num_completed < 2:
                    await asyncio.sleep(0.01)
            if status == "cancelled":
                assert service.batches.cancel(batch_id)
                service.worker.cancel(batch_id)
            batch = await wait(service, batch_id)
            assert batch.status == status
            assert numbers(service, batch.output_file_id) == [0, 1]
            assert batch.error_file_id is not None
            errors = service.files.path(batch.error_file_id).read_text().splitlines()
            assert json.loads(errors[0])["response"]["status_code"] == 400
            left = [json.loads(text) for text in errors[1:]]
            if status == "expired":
                (last,) = left
                assert last["custom_id"] == "line-3"
                assert last["response"] is None
                assert last["error"]["code"] == "batch_expired"
            else:
                assert left == []

    asyncio.run(scenario())


def test_batches_take_turns_within_the_bound(tmp_path: Path) -> None:
    order: list[int] = []
    at_work, most_at_work = 0, 0

    async def submit(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        nonlocal at_work, most_at_work
        at_work += 1
        most_at_work = max(most_at_work, at_work)
        order.append(body["n"])
        await asyncio.sleep(0.002)
        at_work -= 1
        return Reply(status=200, body={"n": body["n"]})

    async def scenario() -> None:
        async with running(tmp_path, submit, slots=2) as service:
            ids = [create(service, 40), create(service, 10)]
            for batch_id in ids:
                service.worker.start(batch_id)
            long, short = [await wait(service, batch_id) for batch_id in ids]
            assert numbers(service, long.output_file_id) == list(range(40))
            assert numbers(service, short.output_file_id) == list(range(10))

    asyncio.run(scenario())
    assert most_at_work == 2
    # The short batch does not wait for the long one.
    ends = [place for place, n in enumerate(order) if n == 9]
    assert max(ends) < 35


def test_a_batch_whose_client_goes_away_begins_and_can_be_cancelled(tmp_path: Path) -> None:
    async def give_up(step: Coroutine[Any, Any, Any], at_work: asyncio.Event) -> None:
        task = asyncio.create_task(step)
        await at_work.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def never(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        await asyncio.sleep(0.01)
        return Reply(status=429, body={}, retry_after_s=600)

    async def scenario() -> None:
        loop, at_work = asyncio.get_running_loop(), asyncio.Event()
        ids: list[str] = []
        async with running(tmp_path, never) as service:

            def create_slowly() -> Batch:
                loop.call_soon_threadsafe(at_work.set)
                time.sleep(0.05)
                ids.append(create(service, 3))
                return service.batches.get(ids[0])

            await give_up(service.start(create_slowly), at_work)
            async with asyncio.timeout(30):
                while not ids or service.batches.get(ids[0]).status != "in_progress":
                    await asyncio.sleep(0.01)
            store_cancel = service.batches.cancel

            def cancel_slowly(batch_id: str) -> bool:
                loop.call_soon_threadsafe(at_work.set)
                time.sleep(0.05)
                return store_cancel(batch_id)

            at_work.clear()
            service.batches.cancel = cancel_slowly  # type: ignore[method-assign]
            await give_up(service.cancel(ids[0]), at_work)
            assert (await wait(service, ids[0])).status == "cancelled"

    asyncio.run(scenario())


def test_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, num_calls = BatchStore.record, 0

    def sometimes_record(store: BatchStore, results: Sequence[LineResult]) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError("no space left")
        record(store, results)

    monkeypatch.setattr(BatchStore, "record", sometimes_record)

    async def scenario() -> None:
        async with running(tmp_path, echo) as service:
            batch_id = create(service, 14)
            service.worker.start(batch_id)
            batch = await wait(service, batch_id)
            assert batch.status == "completed"
            assert numbers(service, batch.error_file_id) == [2, 5, 8, 11]
            assert numbers(service, batch.output_file_id) == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]

    asyncio.run(scenario())
    assert num_calls > 2


def test_a_result_that_comes_while_files_are_written_is_in_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        await asyncio.sleep(3600)
        raise AssertionError

    async def scenario() -> None:
        async with running(tmp_path, never) as service:
            batch_id = create(service, 2)
            service.worker.start(batch_id)
            async with asyncio.timeout(30):
                while service.batches.get(batch_id).status != "in_progress":
                    await asyncio.sleep(0.01)
            late = LineResult(batch_id=batch_id, number=2, failed=False, text='{"late": true}')
            assert service.batches.cancel(batch_id)
            finish = BatchStore.finish

            def finish_late(store: BatchStore, *arguments: Any, **options: Any) -> None:
                store.record([late])
                finish(store, *arguments, **options)

            monkeypatch.setattr(BatchStore, "finish", finish_late)
            batch = service.batches.get(batch_id)
            with pytest.raises(Exception, match="the batch counts 1 and 0"):
                write_outputs(batch, service.batches, service.files)
            write_outputs(batch, service.batches, service.files)
            batch = service.batches.get(batch_id)
            assert batch.status == "cancelled"
            assert batch.output_file_id is not None
            assert service.files.path(batch.output_file_id).read_text() == '{"late": true}\n'

    asyncio.run(scenario())
