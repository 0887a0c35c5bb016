"""From a line to the engine and back: the one place where batches ask questions."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_jsonable_python

from rankonce.serving.failures import answer_failure
from rankonce.serving.models import Models
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerativeScoringBody,
    RankBody,
    RerankBody,
    ScoreBody,
)

ENDPOINTS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/rank", "/v1/score", "/generative_scoring"),
    "/v1/rerank",
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
    question: TypeAdapter[Any]
    answer: Callable[..., Awaitable[object]]
    skips_none: bool = False


class Dispatcher:
    """Asks the models as the routes do, so that a line gets the answer that a client would."""

    def __init__(self, models: Models) -> None:
        self._endpoints = {
            "/v1/completions": _Endpoint(
                question=TypeAdapter(CompletionBody), answer=models.complete
            ),
            "/v1/chat/completions": _Endpoint(question=TypeAdapter(ChatBody), answer=models.chat),
            "/v1/rank": _Endpoint(question=TypeAdapter(RankBody), answer=models.rank),
            "/v1/score": _Endpoint(question=TypeAdapter(ScoreBody), answer=models.score),
            "/generative_scoring": _Endpoint(
                question=TypeAdapter(GenerativeScoringBody), answer=models.score_generatively
            ),
            "/v1/rerank": _Endpoint(
                question=TypeAdapter(RerankBody), answer=models.rerank, skips_none=True
            ),
        }

    async def submit(self, path: str, body: Mapping[str, Any], *, owner: str) -> Reply:
        """Answer one question; whatever fails is an answer too."""
        endpoint = self._endpoints[path]
        try:
            try:
                question = endpoint.question.validate_python({**body, "priority": _LAST})
            except ValidationError as error:
                faults = error.errors(include_url=False)
                raise RequestValidationError(
                    [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
                ) from error
            answer = await endpoint.answer(question, cache_salt=owner or None)
        except Exception as error:  # a fault of one line should not stop its batch
            response = await answer_failure(path, error)
            retry_after = response.headers.get("retry-after", "")
            return Reply(
                status=response.status_code,
                body=from_json(bytes(response.body)),
                retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
            )
        return Reply(status=200, body=to_jsonable_python(answer, exclude_none=endpoint.skips_none))
