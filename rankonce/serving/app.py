"""The routes, and the start of the server."""

import copy
import gc
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from rankonce import __version__
from rankonce.ranker import Ranker
from rankonce.serving.answers import (
    ChatAnswer,
    CompletionAnswer,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelList,
    RankAnswer,
    RerankAnswer,
    ScoreAnswer,
)
from rankonce.serving.batches.dispatch import Dispatcher
from rankonce.serving.batches.routes import add_batches
from rankonce.serving.batches.service import BatchService
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.failures import JsonRoute, answer_failures
from rankonce.serving.schemas import ChatBody, CompletionBody, RankBody, RerankBody, ScoreBody

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The question cannot be answered; param says why."},
    404: {"model": ErrorAnswer, "description": "Another model is served."},
    413: {"model": ErrorAnswer, "description": "Too many candidates, or too many bytes."},
    500: {"model": ErrorAnswer, "description": "The server failed."},
}


def create_app(ranker: Ranker, config: ServerConfig | None = None) -> FastAPI:
    """Build the application around a ranker, which belongs to it from then on."""
    config = config or ServerConfig()
    engine = Engine(ranker, config)
    max_body_bytes = config.max_body_mb * 1_000_000
    batches = None
    if config.batches is not None:
        batches = BatchService(
            config.batches, Dispatcher(engine).submit, max_line_bytes=max_body_bytes
        )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.running(), batches.running() if batches else nullcontext():
            yield

    app = FastAPI(
        title="RankOnce",
        version=__version__,
        description="Reads a member's history once and scores every candidate in the same pass.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    app.state.max_body_bytes = max_body_bytes
    answer_failures(app)
    _add_information(app, engine)
    _add_scoring(app, engine)
    add_batches(app, batches)
    return app


def _add_information(app: FastAPI, engine: Engine) -> None:
    cards = {
        name: ModelCard(
            id=name,
            created=int(time.time()),
            max_model_len=engine.ranker.model.max_prompt_tokens,
            parent=None if name == engine.model_name else engine.model_name,
        )
        for name in (engine.model_name, *engine.adapter_names)
    }

    @app.get("/health")
    async def health() -> Health:
        """Say that the server takes questions."""
        return Health(model=engine.model_name)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the model and its adapters, in OpenAI's form."""
        return ModelList(data=list(cards.values()))

    @app.get("/v1/models/{name:path}", responses={404: _REFUSALS[404]})
    async def model(name: str) -> ModelCard:
        """Describe the model or one of its adapters."""
        return cards[engine.find_adapter(name) or engine.model_name]


def _add_scoring(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/rank", responses=_REFUSALS)
    async def rank(body: RankBody) -> RankAnswer:
        """Score the candidates of one request for a task."""
        return await engine.rank(body)

    @app.post("/v1/score", responses=_REFUSALS)
    async def score(body: ScoreBody) -> ScoreAnswer:
        """Give the probabilities of labels after query and item, in SGLang's form."""
        return await engine.score(body)

    @app.post("/v2/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    @app.post("/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    @app.post("/v1/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    async def rerank(body: RerankBody) -> RerankAnswer:
        """Order documents by relevance, in the form of Cohere and Jina."""
        return await engine.rerank(body)

    @app.post("/v1/completions", responses=_REFUSALS)
    async def completions(body: CompletionBody) -> CompletionAnswer:
        """Read the next token of one or many prompts, in OpenAI's form."""
        return await engine.complete(body)

    @app.post("/v1/chat/completions", responses=_REFUSALS)
    async def chat(body: ChatBody) -> ChatAnswer:
        """Read the first token of the answer to a conversation, in OpenAI's form."""
        return await engine.chat(body)


def open_listener(config: ServerConfig) -> socket.socket:
    """Take the port.

    Raises:
        OSError: it is taken, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol named, asyncio sends small answers at once: Nagle's algorithm would hold
    # each of them for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        place = f"{config.host}, port {config.port}"
        raise OSError(error.errno, f"{place}: {error.strerror}") from error
    return listener


def run_server(ranker: Ranker, config: ServerConfig, listener: socket.socket) -> None:
    """Serve until the process is told to stop; logs go to stderr."""
    log_config = copy.deepcopy(LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    server = uvicorn.Server(
        uvicorn.Config(create_app(ranker, config), log_config=log_config, ws="none")
    )
    # The model's objects live as long as the process: the collector need not look at them again.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
