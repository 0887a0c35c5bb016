"""Servers on a free port of this machine, each around a small random model."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from rankonce.model.loading import prepare_model
from rankonce.ranker import Ranker
from rankonce.serving.app import create_app, open_listener
from rankonce.serving.connections import bounded_protocol
from rankonce.serving.engine import ServerConfig
from rankonce.serving.operations import OperationsConfig
from tests.conftest import build_network, build_tokenizer

ARCHITECTURE = "qwen3"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server and what its answers should equal.

    Attributes:
        ranker: same weights and tokenizer as the served one, free to use in a test.
        network: the same weights in plain transformers.
    """

    http: httpx.Client
    openai: OpenAI
    ranker: Ranker
    network: Any
    tokenizer: Any

    def plain_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probabilities of the next token by plain transformers."""
        with torch.no_grad():
            return self.network(torch.tensor([token_ids])).logits[0, -1].log_softmax(dim=-1)


@contextmanager
def serving(
    ranker: Ranker | Mapping[str, Ranker],
    operations: OperationsConfig | None = None,
    **options: Any,
) -> Iterator[httpx.Client]:
    """Serve a ranker with uvicorn in a thread of its own, cold unless operations say otherwise."""
    operations = operations or OperationsConfig(warm_up=False)
    app = create_app(ranker, ServerConfig(**options), operations)
    with serving_app(app, operations) as client:
        yield client


@contextmanager
def serving_app(app: FastAPI, operations: OperationsConfig | None = None) -> Iterator[httpx.Client]:
    """Serve an application in the same way."""
    operations = operations or OperationsConfig(warm_up=False)
    listener = open_listener(ServerConfig(port=0))
    protocol = bounded_protocol(
        header_timeout_s=operations.header_timeout_s, write_timeout_s=operations.write_timeout_s
    )
    server = uvicorn.Server(
        uvicorn.Config(app, http=protocol, log_config=None, access_log=False, ws="none")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def build_ranker(*, chat: bool) -> Ranker:
    """Build the random ranker that the servers of these tests have."""
    return Ranker(
        prepare_model(build_network(ARCHITECTURE), build_tokenizer(chat=chat), name="tiny")
    )


@contextmanager
def _served(*, chat: bool) -> Iterator[Served]:
    # Retries would hide a failure.
    with (
        serving(build_ranker(chat=chat)) as http,
        OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as openai,
    ):
        yield Served(
            http=http,
            openai=openai,
            ranker=build_ranker(chat=chat),
            network=build_network(ARCHITECTURE),
            tokenizer=build_tokenizer(chat=chat),
        )


@pytest.fixture(scope="session")
def plain() -> Iterator[Served]:
    """A model without a chat template."""
    with _served(chat=False) as served:
        yield served


@pytest.fixture(scope="session")
def chatty() -> Iterator[Served]:
    """A model with a chat template."""
    with _served(chat=True) as served:
        yield served
