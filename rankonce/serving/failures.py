"""Every failure becomes an answer in OpenAI's form: status, message, type, param, code."""

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from rankonce.errors import (
    EngineError,
    NumericsError,
    PromptTooLongError,
    RankOnceError,
    RequestError,
    TaskError,
)
from rankonce.records import describe_faults
from rankonce.serving.exchanges import count_tokens, current_exchange

logger = logging.getLogger(__name__)

# A question may have a fault in every candidate.
_MAX_FAULTS = 5
# Nobody reads it but logs; the number is nginx's.
_CLIENT_GONE = 499
# Seconds in which an engine may be back.
_ENGINE_RETRY_S = "5"
_FIELD = re.compile(r"([A-Za-z_][\w.\[\]]*): ")


class ServingError(HTTPException):
    """A question that the server refuses before it reaches the ranker."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=headers)
        self.code = code


class TooLargeError(ServingError):
    """More candidates or bytes than the server takes."""

    def __init__(self, message: str) -> None:
        super().__init__(413, message, code="request_too_large")


class UnknownModelError(ServingError):
    """A model or adapter that this server does not have.

    Args:
        field: of the question, which names it.
        served: what that field could be.
    """

    def __init__(self, field: str, name: str, served: Sequence[str]) -> None:
        names = ", ".join(map(repr, served)) or "none"
        super().__init__(
            404, f"{field}: there is no {name!r}, this server has {names}", code="model_not_found"
        )


class UnauthorizedError(ServingError):
    """No key, or one that the server does not know."""

    def __init__(self) -> None:
        super().__init__(
            401,
            "the question should carry an API key that this server knows, as Authorization: "
            "Bearer KEY or as X-API-Key: KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class LaterError(ServingError):
    """A question that may be asked again, but not now.

    Args:
        status: 429 if the client asks too much, 503 if the server cannot.
        wait_s: seconds after which it may succeed; told as ``Retry-After``, rounded up.
    """

    def __init__(self, status: int, message: str, *, code: str, wait_s: float) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
        super().__init__(status, message, code=code, headers=headers)


class TooSlowError(ServingError):
    """A body that takes its time."""

    def __init__(self) -> None:
        # What is left of the body would stand where the next question should begin.
        super().__init__(
            408,
            "the body should be sent without delay",
            code="request_timeout",
            headers={"Connection": "close"},
        )


class BoundedRequest(Request):
    """A request whose body is bounded, and strict JSON."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_read = asyncio.Event()

    async def body(self) -> bytes:
        """Read the body, unless it is larger than the server takes."""
        if not hasattr(self, "_body"):
            self._body = await self._read_body(self.app.state.max_body_bytes)
            self.is_read.set()
        return self._body

    async def json(self) -> Any:
        """Decode the body: no NaN, no lone surrogates, bounded depth."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ServingError(400, f"the body is not JSON: {error}") from error

    async def _read_body(self, max_bytes: int) -> bytes:
        # A declared length spares the transfer.
        size = int(self.headers.get("content-length", 0))
        if size <= max_bytes:
            chunks, size = [], 0
            async for chunk in self.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > max_bytes:
                    break
            else:
                return b"".join(chunks)
        raise TooLargeError(f"the body should have at most {max_bytes:,} bytes")


class JsonRoute(APIRoute):
    """A route that reads its body as ``BoundedRequest`` does, and survives a crash of its own."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, count_tokens(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that FastAPI builds."""
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            bounded = BoundedRequest(request.scope, request.receive)
            try:
                return await _while_connected(bounded, handle(bounded))
            except (HTTPException, RequestValidationError, RankOnceError):
                raise
            except Exception:  # a bug; it should cost neither the connection nor a secret
                logger.exception("%s %s crashed", request.method, self.path)
                return _answer(500, "the server failed; its log says why")

        return handle_bounded


async def _while_connected(
    request: BoundedRequest, answer: Coroutine[Any, Any, Response]
) -> Response:
    """Answer a request, and stop where the client goes away after it has sent the body."""

    async def watch() -> None:
        await request.is_read.wait()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working})
        if working.cancelled():
            return Response(status_code=_CLIENT_GONE)
        return working.result()
    finally:
        # Whoever cancels this, a server that stops, cancels both.
        working.cancel()
        watching.cancel()


def refuse(error: ServingError) -> Response:
    """Answer what is refused before it reaches a route."""
    return _answer(error.status_code, error.detail, code=error.code, headers=error.headers)


def answer_failures(app: FastAPI) -> None:
    """Put the handlers on an app; they are tried from the class of the error upwards."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def answer_failure(path: str, error: Exception) -> Response:
    """Answer a failure of a question that came another way than over HTTP.

    Args:
        path: the endpoint that was asked.
    """
    request = Request({"type": "http", "method": "POST", "path": path, "headers": []})
    for kind in type(error).__mro__:
        if handler := _HANDLERS.get(kind):
            return await handler(request, error)
    logger.error("POST %s crashed", path, exc_info=error)
    return _answer(500, "the server failed; its log says why")


def _answer(
    status: int,
    message: str,
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    named = _FIELD.match(message)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    exchange = current_exchange()
    if exchange is not None:
        exchange.code = code or kind
    error = {
        "message": message,
        "type": kind,
        "param": named[1] if named else None,
        "code": code,
    }
    return JSONResponse({"error": error}, status, headers=headers)


async def _on_http(request: Request, error: Exception) -> Response:
    fault = cast(HTTPException, error)
    message, code = fault.detail, getattr(fault, "code", None)
    if not isinstance(fault, ServingError):
        path = f"{request.method} {request.url.path}"
        if fault.status_code == 404:
            message, code = f"there is no {path}", "not_found"
        elif fault.status_code == 405:
            allowed = (fault.headers or {}).get("Allow", "another method")
            message, code = f"there is no {path}, use {allowed}", "method_not_allowed"
    return _answer(fault.status_code, message, code=code, headers=fault.headers)


async def _on_validation(request: Request, error: Exception) -> Response:
    faults = [
        {**fault, "loc": fault["loc"][1:]} for fault in cast(RequestValidationError, error).errors()
    ]
    if not faults[0]["loc"] and faults[0]["type"] != "value_error":
        message = "the body should be a JSON object, sent with Content-Type: application/json"
        return _answer(400, message)
    # A fault of two fields together has no place and names them itself.
    lines = [describe_faults([fault]).removeprefix("request: ") for fault in faults[:_MAX_FAULTS]]
    if len(faults) > _MAX_FAULTS:
        lines.append(f"and {len(faults) - _MAX_FAULTS} more")
    return _answer(400, "; ".join(lines))


async def _on_bad_request(request: Request, error: Exception) -> Response:
    too_long = isinstance(error, PromptTooLongError)
    return _answer(400, str(error), code="context_length_exceeded" if too_long else None)


async def _on_engine_error(request: Request, error: Exception) -> Response:
    # What it said names an address that is the operator's alone.
    logger.error("%s", error)
    return _answer(
        503,
        "the engine behind this server does not answer; its log says why",
        code="engine_error",
        headers={"Retry-After": _ENGINE_RETRY_S},
    )


async def _on_house_error(request: Request, error: Exception) -> Response:
    logger.error("%s: %s", type(error).__name__, error)
    code = "numerics_error" if isinstance(error, NumericsError) else None
    return _answer(500, str(error), code=code)


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _on_http,
    RequestValidationError: _on_validation,
    RequestError: _on_bad_request,
    TaskError: _on_bad_request,
    EngineError: _on_engine_error,
    RankOnceError: _on_house_error,
}
