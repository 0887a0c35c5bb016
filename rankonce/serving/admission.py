"""What every question passes on its way in and out: its id, its key, its limits, its log line."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from rankonce.serving.bodies import OpenBodies, Receive
from rankonce.serving.exchanges import Exchange, begin_exchange
from rankonce.serving.failures import LaterError, ServingError, UnauthorizedError, refuse
from rankonce.serving.keys import ApiKey
from rankonce.serving.lifecycle import Lifecycle
from rankonce.serving.limits import Grant, RateLimits
from rankonce.serving.logs import log_exchange
from rankonce.serving.metrics import Metrics
from rankonce.serving.operations import OperationsConfig
from rankonce.serving.tracing import Tracing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
LOAD_ADAPTER_PATH = "/v1/load_lora_adapter"
UNLOAD_ADAPTER_PATH = "/v1/unload_lora_adapter"
# They say nothing of any question, and what asks for them (probes, browsers) has no key.
_OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
# What is refused before the engine hears of it, which counts its own.
_REFUSALS = frozenset(
    {
        *("invalid_api_key", "permission_denied", "rate_limit_exceeded", "request_timeout"),
        *("request_too_large", "bodies_full", "shutting_down"),
    }
)
# Uploads go to disk as they come and have a bound of their own.
_STREAMED_PATHS = frozenset({"/v1/files"})
_ANYBODY = ApiKey(name="", digest=b"")
# Nobody was there any more to be told anything else.
_CLIENT_GONE = 499


@dataclass(kw_only=True)
class _Answered:
    """What went out so far."""

    status: int | None = None


class Admission:
    """The layer around the application.

    Args:
        app: answers what is admitted.
        config: who is admitted.
        lifecycle: of the server.
        metrics: count every question.
        tracing: takes every question, if there is one.
    """

    def __init__(
        self,
        app: Application,
        *,
        config: OperationsConfig,
        lifecycle: Lifecycle,
        metrics: Metrics,
        tracing: Tracing | None,
    ) -> None:
        self._app = app
        self._config = config
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracing = tracing
        self._bodies = OpenBodies(
            max_bytes=config.max_open_body_mb * 1_000_000, timeout_s=config.body_timeout_s
        )
        self._limits = RateLimits(
            requests_per_minute=config.requests_per_minute,
            tokens_per_minute=config.tokens_per_minute,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one question, count it and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = begin_exchange(scope["method"], headers.get("x-request-id"))
        answered = _Answered()
        chunks: list[bytes] | None = [] if self._config.log_bodies and _is_json(headers) else None
        began = time.perf_counter()
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._answer(
                    scope,
                    self._bodies.bound(
                        receive, exchange, chunks, is_held=scope["path"] not in _STREAMED_PATHS
                    ),
                    self._observe(send, exchange, answered),
                    exchange=exchange,
                    answered=answered,
                    headers=headers,
                )
            finally:
                self._bodies.release(exchange)
                route = scope.get("route")
                exchange.route = getattr(route, "path", exchange.route)
                if chunks:
                    exchange.body = b"".join(chunks).decode(errors="replace")
                seconds = time.perf_counter() - began
                self._report(scope, exchange, headers, answered.status or _CLIENT_GONE, seconds)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        exchange: Exchange,
        answered: _Answered,
        headers: Headers,
    ) -> None:
        grant: Grant | None = None
        try:
            key = self._identify(scope["path"], headers)
            exchange.owner = key.name
            scope.setdefault("state", {}).update(request_id=exchange.id, owner=key.name)
            if scope["method"] == "POST":
                grant = self._admit(key, headers)
            await self._app(scope, receive, send)
        except ServingError as error:
            await refuse(error)(scope, receive, send)
        except asyncio.CancelledError:
            if not self._lifecycle.is_draining or answered.status is not None:
                raise
            # uvicorn's patience with running questions is over; another server may take this one.
            stopping = LaterError(503, "the server stops", code="shutting_down", wait_s=1)
            await refuse(stopping)(scope, receive, send)
        except Exception:  # a bug outside of the routes, which answer for themselves
            logger.exception("%s crashed", exchange.method)
            if answered.status is not None:
                raise
            crash = ServingError(500, "the server failed; its log says why")
            await refuse(crash)(scope, receive, send)
        finally:
            if grant is not None:
                self._limits.settle(grant, exchange.num_tokens or 0)

    def _identify(self, path: str, headers: Mapping[str, str]) -> ApiKey:
        """Find whose question it is.

        Raises:
            ServingError: it has no key that opens this path.
        """
        ring = self._config.keys
        is_open = path in _OPEN_PATHS or (path == METRICS_PATH and self._config.open_metrics)
        if ring is None or is_open:
            return _ANYBODY
        key = ring.find(_read_secret(headers))
        if key is None:
            raise UnauthorizedError
        if path == METRICS_PATH and not key.reads_metrics:
            raise ServingError(
                403,
                "/metrics tells of all keys: a key that may read it has the word metrics in its "
                "line",
                code="permission_denied",
            )
        if path in (LOAD_ADAPTER_PATH, UNLOAD_ADAPTER_PATH) and not key.changes_adapters:
            raise ServingError(
                403,
                "adapters are for all keys: a key that may load and unload them has the word "
                "adapters in its line",
                code="permission_denied",
            )
        return key

    def _admit(self, key: ApiKey, headers: Mapping[str, str]) -> Grant:
        length = headers.get("content-length", "")
        admitted = self._limits.admit(key, num_bytes=int(length) if length.isdecimal() else 0)
        if isinstance(admitted, Grant):
            return admitted
        raise LaterError(
            429,
            f"this key's requests or tokens of the minute are used up: come back in {admitted:.1f} "
            "seconds",
            code="rate_limit_exceeded",
            wait_s=admitted,
        )

    def _observe(self, send: Send, exchange: Exchange, answered: _Answered) -> Send:
        """Wrap what sends the answer: note its status, give it the request's id."""

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", exchange.id.encode())]
                if self._lifecycle.is_draining:
                    # The client's next question should go to another server.
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        return send_observed

    def _report(
        self, scope: Scope, exchange: Exchange, headers: Headers, status: int, seconds: float
    ) -> None:
        self._metrics.on_answer(exchange, status=status, seconds=seconds)
        if exchange.code in _REFUSALS:
            self._metrics.on_turned_away(exchange.code)
        client = scope.get("client")
        log_exchange(exchange, status=status, seconds=seconds, client=client[0] if client else None)
        if self._tracing is not None:
            self._tracing.record(exchange, headers, status=status)


def _read_secret(headers: Mapping[str, str]) -> str:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret:
        return secret.strip()
    return headers.get("x-api-key", "")


def _is_json(headers: Mapping[str, str]) -> bool:
    return "json" in headers.get("content-type", "json")
