"""A server that is killed in mid-batch goes on where it was."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import Batch

from tests.conftest import build_network, build_tokenizer
from tests.serving.batches.conftest import line, wait_for_end
from tests.serving.batches.test_batches import same, without_ids

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
COMMAND = "import typer; from rankonce.cli.serve import serve; typer.run(serve)"
URL = "/v1/completions"
NUM_LINES = 121


@contextmanager
def process(model: Path, data_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], OpenAI]]:
    """Run the real command and wait until it takes questions."""
    arguments = ["--model", str(model), "--port", "0", "--data-dir", str(data_dir)]
    log = model.with_suffix(".log")
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--batch-lines-in-flight", "3"],
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    with server:
        try:
            while (found := ADDRESS.search(log.read_text())) is None:
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            with OpenAI(base_url=f"{found[0]}/v1", api_key="none", timeout=60) as client:
                yield server, client
        finally:
            server.kill()


def kill_at(server: subprocess.Popen[bytes], client: OpenAI, batch_id: str, num_done: int) -> None:
    """Kill a server once its batch has so many lines."""
    while num_finished(client.batches.retrieve(batch_id)) < num_done:
        time.sleep(0.005)
    server.send_signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL


def num_finished(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed + batch.request_counts.failed


def num_results(data_dir: Path) -> int:
    """Count results on disk, with no server running."""
    with closing(sqlite3.connect(data_dir / "batches.sqlite3")) as connection:
        (num,) = connection.execute(
            "SELECT count(*) FROM lines WHERE result IS NOT NULL"
        ).fetchone()
    return int(num)


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).iter_lines()]


def test_a_killed_server_loses_no_line_and_writes_none_twice(tmp_path: Path) -> None:
    model, data_dir = tmp_path / "tiny-ranker", tmp_path / "data"
    build_network("llama").save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    questions = [
        {
            "prompt": [f"M {'Heat ' * (n % 7)}{n}\n{candidate}" for candidate in "abc"],
            # Every ninth line is one that the server refuses.
            "max_tokens": 2 if n % 9 == 8 else 1,
            "logprobs": 1,
            "labels": [" Yes", " No"],
        }
        for n in range(NUM_LINES)
    ]
    content = "".join(f"{json.dumps(line(f'line-{n}', URL, q))}\n" for n, q in enumerate(questions))
    with process(model, data_dir) as (server, client):
        file = client.files.create(file=("q.jsonl", content.encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        kill_at(server, client, batch.id, 20)
    assert 20 <= num_results(data_dir) < NUM_LINES
    with process(model, data_dir) as (_, client):
        batch = wait_for_end(client, batch.id)
        uninterrupted = client.batches.create(
            input_file_id=file.id, endpoint=URL, completion_window="24h"
        )
        uninterrupted = wait_for_end(client, uninterrupted.id)
        assert batch.status == uninterrupted.status == "completed"
        assert batch.request_counts == uninterrupted.request_counts
        assert batch.request_counts is not None
        assert batch.request_counts.total == NUM_LINES
        all_ids = []
        for kind in ("output_file_id", "error_file_id"):
            resumed = lines_of(client, getattr(batch, kind))
            whole = lines_of(client, getattr(uninterrupted, kind))
            assert [part["custom_id"] for part in resumed] == [part["custom_id"] for part in whole]
            for part, other in zip(resumed, whole, strict=True):
                assert part["response"]["status_code"] == other["response"]["status_code"]
                bodies = (part["response"]["body"], other["response"]["body"])
                assert same(*map(without_ids, bodies))
            all_ids += [part["custom_id"] for part in resumed]
        assert sorted(all_ids) == sorted(f"line-{n}" for n in range(NUM_LINES))
        assert len(client.files.list().data) == 5
    assert num_results(data_dir) == 0
