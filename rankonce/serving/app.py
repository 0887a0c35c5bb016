"""The routes, and the start of the server."""

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from rankonce import __version__
from rankonce.errors import EngineError
from rankonce.ranker import Ranker
from rankonce.serving.admission import (
    LOAD_ADAPTER_PATH,
    METRICS_PATH,
    UNLOAD_ADAPTER_PATH,
    Admission,
)
from rankonce.serving.answers import (
    ChatAnswer,
    CompletionAnswer,
    ErrorAnswer,
    GenerativeScoringAnswer,
    Health,
    ModelCard,
    ModelList,
    PrefixAnswer,
    RankAnswer,
    ScoreAnswer,
)
from rankonce.serving.batches.dispatch import Dispatcher
from rankonce.serving.batches.routes import add_batches
from rankonce.serving.batches.service import BatchService
from rankonce.serving.connections import bounded_protocol
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.exchanges import current_salt
from rankonce.serving.failures import JsonRoute, answer_failures
from rankonce.serving.lifecycle import DrainingServer, Lifecycle, Phase
from rankonce.serving.metrics import CONTENT_TYPE, EngineState, Metrics
from rankonce.serving.models import Models
from rankonce.serving.operations import OperationsConfig
from rankonce.serving.rerank_shapes import AnyRerankAnswer, RerankBody
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerativeScoringBody,
    LoadAdapterBody,
    PrefixBody,
    RankBody,
    ScoreBody,
    UnloadAdapterBody,
)
from rankonce.serving.tracing import open_tracing
from rankonce.serving.warm_up import warm_up

logger = logging.getLogger(__name__)

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The question cannot be answered; param says why."},
    401: {"model": ErrorAnswer, "description": "There is no API key, or one unknown here."},
    404: {"model": ErrorAnswer, "description": "Another model is served."},
    408: {"model": ErrorAnswer, "description": "The body takes its time."},
    413: {"model": ErrorAnswer, "description": "Too many candidates, or too many bytes."},
    429: {"model": ErrorAnswer, "description": "Too many; Retry-After says when to come back."},
    500: {"model": ErrorAnswer, "description": "The server failed."},
    503: {"model": ErrorAnswer, "description": "Not now; Retry-After says when to come back."},
}


class Readiness(BaseModel):
    """Whether the server should get traffic, and if not, why."""

    status: Phase


def create_app(
    ranker: Ranker | Mapping[str, Ranker],
    config: ServerConfig | None = None,
    operations: OperationsConfig | None = None,
) -> FastAPI:
    """Build the application around one ranker or several by name, which belong to it then.

    Its ``state.lifecycle`` tells the phase it is in, ``state.models`` what answers.
    """
    config = config or ServerConfig()
    operations = operations or OperationsConfig()
    models = Models(ranker, config)
    lifecycle = Lifecycle()
    metrics = Metrics(version=__version__, models=[one.model_name for one in models.engines])
    for engine in models.engines:
        _watch(metrics, engine)
    tracing = None
    if operations.otlp_endpoint is not None:
        tracing = open_tracing(operations.otlp_endpoint, version=__version__)

    max_body_bytes = config.max_body_mb * 1_000_000
    batches = None
    if config.batches is not None:
        batches = BatchService(
            config.batches, Dispatcher(models).submit, max_line_bytes=max_body_bytes
        )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with models.running(), batches.running() if batches else nullcontext():
            warming_up = asyncio.create_task(_warm_up(models, lifecycle, operations))
            yield
            warming_up.cancel()
            await asyncio.gather(warming_up, return_exceptions=True)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="RankOnce",
        version=__version__,
        description="Reads a member's history once and scores every candidate in the same pass.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    app.state.max_body_bytes = max_body_bytes
    app.state.models = models
    app.state.lifecycle = lifecycle
    app.add_middleware(
        Admission, config=operations, lifecycle=lifecycle, metrics=metrics, tracing=tracing
    )
    answer_failures(app)
    _add_operations(app, metrics, lifecycle, models)
    _add_information(app, models)
    _add_scoring(app, models)
    _add_adapters(app, models)
    add_batches(app, batches)
    return app


def _watch(metrics: Metrics, engine: Engine) -> None:
    engine.observations.subscribe(metrics)
    metrics.watch(
        EngineState(
            model=engine.model_name, queue=lambda: engine.queue, caches=lambda: engine.caches
        )
    )


async def _warm_up(models: Models, lifecycle: Lifecycle, operations: OperationsConfig) -> None:
    try:
        if operations.warm_up:
            async with models.unchanged():
                for engine in models.engines:
                    await warm_up(engine)
            # What is there now lives as long as the process: the collector need not look at it
            # again.
            gc.collect()
            gc.freeze()
    except Exception:  # whatever it is, clients would meet it as well
        logger.exception("the warm-up failed: this server is not ready")
        lifecycle.fail()
        return
    lifecycle.finish_warm_up()


async def _find_phase(lifecycle: Lifecycle, models: Models) -> Phase:
    """Look at the server and at the engines that compute its passes."""
    if lifecycle.phase is not Phase.READY:
        return lifecycle.phase
    try:
        checks = [one.ranker.scorer.check for one in models.engines]
        await asyncio.gather(*(asyncio.to_thread(check) for check in checks))
    except EngineError as error:
        logger.warning("%s", error)
        return Phase.ENGINE_DOWN
    return Phase.READY


def _add_operations(app: FastAPI, metrics: Metrics, lifecycle: Lifecycle, models: Models) -> None:
    @app.get("/ready", responses={503: {"model": Readiness, "description": "Not now."}})
    async def ready(response: Response) -> Readiness:
        """Say whether the server should get traffic."""
        phase = await _find_phase(lifecycle, models)
        if phase is not Phase.READY:
            response.status_code = 503
        return Readiness(status=phase)

    @app.get(METRICS_PATH, response_class=Response)
    async def read_metrics() -> Response:
        """Tell what the server did, for Prometheus."""
        metrics.ready.set(await _find_phase(lifecycle, models) is Phase.READY)
        return Response(metrics.write(), media_type=CONTENT_TYPE)


def _add_information(app: FastAPI, models: Models) -> None:
    @app.get("/health")
    async def health() -> Health:
        """Say that the process lives."""
        return Health(model=models.model_name)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the models and their adapters, in OpenAI's form."""
        return ModelList(data=list(models.cards.values()))

    @app.get("/v1/models/{name:path}", responses={404: _REFUSALS[404]})
    async def describe_model(name: str) -> ModelCard:
        """Describe a model or an adapter."""
        models.find(name)
        return models.cards[name]


def _add_scoring(app: FastAPI, models: Models) -> None:
    @app.post("/v1/rank", responses=_REFUSALS)
    async def rank(body: RankBody) -> RankAnswer:
        """Score the candidates of one request for a task."""
        return await models.ask(Engine.rank, body, cache_salt=current_salt())

    @app.post("/v1/prefixes", responses=_REFUSALS)
    async def prefixes(body: PrefixBody) -> PrefixAnswer:
        """Read a member's history before the candidates are known."""
        return await models.ask(Engine.prepare_prefix, body, cache_salt=current_salt())

    @app.post("/v1/score", responses=_REFUSALS)
    async def score(body: ScoreBody) -> ScoreAnswer:
        """Give the probabilities of labels after query and item, in SGLang's form."""
        return await models.ask(Engine.score, body, cache_salt=current_salt())

    @app.post("/generative_scoring", responses=_REFUSALS)
    async def generative_scoring(body: GenerativeScoringBody) -> GenerativeScoringAnswer:
        """Give the probability of the first label after query and item, in vLLM's form."""
        return await models.ask(Engine.score_generatively, body, cache_salt=current_salt())

    @app.post("/v2/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    @app.post("/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    @app.post("/v1/rerank", responses=_REFUSALS, response_model_exclude_none=True)
    async def rerank(body: RerankBody) -> AnyRerankAnswer:
        """Order documents by relevance, in the form of whose words the question has."""
        return await models.ask(Engine.rerank, body, cache_salt=current_salt())

    @app.post("/v1/completions", responses=_REFUSALS)
    async def completions(body: CompletionBody) -> CompletionAnswer:
        """Read the next token of one or many prompts, in OpenAI's form."""
        return await models.ask(Engine.complete, body, cache_salt=current_salt())

    @app.post("/v1/chat/completions", responses=_REFUSALS)
    async def chat(body: ChatBody) -> ChatAnswer:
        """Read the first token of the answer to a conversation, in OpenAI's form."""
        return await models.ask(Engine.chat, body, cache_salt=current_salt())


def _add_adapters(app: FastAPI, models: Models) -> None:
    responses = {
        **_REFUSALS,
        200: {
            "description": "Done.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        403: {"model": ErrorAnswer, "description": "Not allowed here."},
    }

    # With the class of plain text, refusals, which are JSON, would be described as such too.
    @app.post(LOAD_ADAPTER_PATH, responses=responses, response_class=Response)
    async def load_lora_adapter(body: LoadAdapterBody) -> PlainTextResponse:
        """Load an adapter over a model, in vLLM's form; the server must allow it."""
        return PlainTextResponse(await models.load_adapter(body))

    @app.post(UNLOAD_ADAPTER_PATH, responses=responses, response_class=Response)
    async def unload_lora_adapter(body: UnloadAdapterBody) -> PlainTextResponse:
        """Forget an adapter, in vLLM's form, when the questions that use it are answered."""
        return PlainTextResponse(await models.unload_adapter(body))


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


def run_server(
    ranker: Ranker | Mapping[str, Ranker],
    config: ServerConfig,
    listener: socket.socket,
    operations: OperationsConfig | None = None,
) -> bool:
    """Serve until the process is told to stop, and finish what runs then.

    Returns:
        Whether the server could answer; its log says why not.
    """
    operations = operations or OperationsConfig()
    app = create_app(ranker, config, operations)
    lifecycle: Lifecycle = app.state.lifecycle
    server = DrainingServer(
        uvicorn.Config(
            app,
            http=bounded_protocol(
                header_timeout_s=operations.header_timeout_s,
                write_timeout_s=operations.write_timeout_s,
            ),
            # The process has its handlers already, and the application logs every question itself.
            log_config=None,
            access_log=False,
            ws="none",
            # uvicorn counts whole seconds, and 0 would wait for ever.
            timeout_graceful_shutdown=max(1, round(operations.drain_timeout_s)),
            server_header=False,
        ),
        lifecycle,
        drain_delay_s=operations.drain_delay_s,
    )
    server.run(sockets=[listener])
    return lifecycle.phase is not Phase.FAILED
