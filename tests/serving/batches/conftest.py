"""A server that keeps files and batches, and what its clients send."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import Batch

from rankonce.serving.batches.config import BatchConfig
from tests.serving.conftest import build_ranker, serving

ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """A running server with a data folder."""

    http: httpx.Client
    openai: OpenAI
    folder: Path

    def upload(self, *lines: Any, name: str = "lines.jsonl") -> str:
        """Upload lines, each as JSON or as it is, and return the file's id."""
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file = self.openai.files.create(file=(name, content.encode()), purpose="batch")
        return file.id

    def run(self, endpoint: str, *lines: Any, **options: Any) -> Batch:
        """Create a batch of these lines and wait for its end."""
        return self.wait(self.create(endpoint, *lines, **options).id)

    def create(self, endpoint: str, *lines: Any, window: str = "24h", **options: Any) -> Batch:
        return self.openai.batches.create(
            input_file_id=self.upload(*lines),
            endpoint=endpoint,  # type: ignore[arg-type]
            completion_window=window,  # type: ignore[arg-type]
            **options,
        )

    def wait(self, batch_id: str) -> Batch:
        return wait_for_end(self.openai, batch_id)

    def lines_of(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(line) for line in self.openai.files.content(file_id).iter_lines()]


def wait_for_end(client: OpenAI, batch_id: str, *, within_s: float = 60) -> Batch:
    """Ask until a batch has ended."""
    end = time.monotonic() + within_s
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < end, batch
        time.sleep(0.02)
    return batch


def line(custom_id: str, endpoint: str, body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}


@contextmanager
def keeping(folder: Path, *, chat: bool = True, **options: Any) -> Iterator[Keeper]:
    """Serve the small random model with a data folder."""
    batches = BatchConfig(data_dir=folder, **options)
    with (
        serving(build_ranker(chat=chat), batches=batches, max_body_mb=1) as http,
        OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as openai,
    ):
        yield Keeper(http=http, openai=openai, folder=folder)


@pytest.fixture(scope="session")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    with keeping(tmp_path_factory.mktemp("data"), max_file_mb=1, max_lines=50) as keeper:
        yield keeper
