"""From a line to the engine and back: the one place where batches ask questions."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_jsonable_python

from rankonce.serving.engine import Engine
from rankonce.serving.failures import answer_failure
from rankonce.serving.models import Models
from rankonce.serving.rerank_shapes import RerankBody
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerativeScoringBody,
    RankBody,
    ScoreBody,
)

# Whatever a line says of its priority: live questions are served first.
_LAST = 1000


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an endpoint answers.

    Attributes:
        body: the JSON that a client would get: an object, or the bare list of some rerank forms.
        retry_after_s: when the server, which is busy, wants to be asked again.
    """

    status: int
    body: dict[str, Any] | list[Any]
    retry_after_s: float | None = None


class Submit(Protocol):
    """Answers one question for its owner."""

    async def __call__(self, path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        """Answer; whatever fails is an answer too."""


@dataclass(frozen=True, kw_only=True)
class _Endpoint:
    question: type
    method: Callable[..., Awaitable[object]]
    skips_none: bool = False


_ENDPOINTS = {
    "/v1/completions": _Endpoint(question=CompletionBody, method=Engine.complete),
    "/v1/chat/completions": _Endpoint(question=ChatBody, method=Engine.chat),
    "/v1/rank": _Endpoint(question=RankBody, method=Engine.rank),
    "/v1/score": _Endpoint(question=ScoreBody, method=Engine.score),
    "/generative_scoring": _Endpoint(
        question=GenerativeScoringBody, method=Engine.score_generatively
    ),
    "/v1/rerank": _Endpoint(question=RerankBody, method=Engine.rerank, skips_none=True),
}
ENDPOINTS = tuple(_ENDPOINTS)


class Dispatcher:
    """Asks the models as the routes do, so that a line gets the answer that a client would."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._readers: dict[str, TypeAdapter[Any]] = {
            path: TypeAdapter(endpoint.question) for path, endpoint in _ENDPOINTS.items()
        }

    async def submit(self, path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        """Answer one question; whatever fails is an answer too."""
        endpoint = _ENDPOINTS[path]
        try:
            try:
                question = self._readers[path].validate_python({**body, "priority": _LAST})
            except ValidationError as error:
                faults = error.errors(include_url=False)
                raise RequestValidationError(
                    [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
                ) from error
            answer = await self._models.ask(endpoint.method, question, cache_salt=owner or None)
        except Exception as error:  # a fault of one line should not stop its batch
            response = await answer_failure(path, error)
            retry_after = response.headers.get("retry-after", "")
            return Reply(
                status=response.status_code,
                body=from_json(bytes(response.body)),
                retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
            )
        return Reply(status=200, body=to_jsonable_python(answer, exclude_none=endpoint.skips_none))
