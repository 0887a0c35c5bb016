"""A client of the server: one method an endpoint, typed answers, retries when the server says so.

``Client`` waits, ``AsyncClient`` is awaited; both build the same calls. Needs ``rankonce[client]``:
neither torch nor a model.
"""

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ValidationError

from rankonce.errors import MissingDependencyError, ServerError
from rankonce.records import ScoreRequest
from rankonce.serving.answers import (
    ChatAnswer,
    CompletionAnswer,
    ErrorAnswer,
    ModelList,
    RankAnswer,
    ScoreAnswer,
)
from rankonce.serving.rerank_shapes import RerankAnswer

if TYPE_CHECKING:
    import httpx

Answer = TypeVar("Answer", bound=BaseModel)
_LATER = (429, 503)
# What the proxies of ``rankonce serve --ray`` choose a replica by.
SESSION_HEADER = "x-session-id"


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a client asks.

    Attributes:
        url: of the server, without the path.
        api_key: sent as a bearer token.
        model: asked where a call names none.
        timeout_s: for one answer.
        max_retries: after 429 and 503, which say that the question was not computed.
        max_wait_s: a longer ``Retry-After`` is not waited for.
    """

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None
    timeout_s: float = 60.0
    max_retries: int = 4
    max_wait_s: float = 30.0


class LabelOptions(TypedDict, total=False):
    """Labels as words or as token ids."""

    labels: Sequence[str]
    label_token_ids: Sequence[int]
    model: str


class RankOptions(TypedDict, total=False):
    """What a rank question has beside its request.

    Attributes:
        member: whoever the history is of; a cluster answers a member's questions where that
            history is cached. Only a digest of it is sent.
    """

    top_n: int
    model: str
    member: str


class RerankOptions(TypedDict, total=False):
    """What a rerank question may have."""

    top_n: int
    return_documents: bool
    rank_fields: Sequence[str]
    max_tokens_per_doc: int
    instruction: str
    task: str
    model: str


class ScoreOptions(LabelOptions, total=False):
    """What a score question may have."""

    apply_softmax: bool
    item_first: bool


class CompletionOptions(LabelOptions, total=False):
    """What a completion may have."""

    logprobs: int


class ChatOptions(LabelOptions, total=False):
    """What a chat may have."""

    logprobs: bool
    top_logprobs: int


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Answer]):
    """One question: where it goes and what its answer is."""

    path: str
    answer: type[Answer]
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def with_model(self, model: str | None) -> "Call[Answer]":
        """Name a model where the call names none."""
        if self.body is None or model is None or "model" in self.body:
            return self
        return replace(self, body={**self.body, "model": model})


def rank_call(request: ScoreRequest | Mapping[str, Any], options: RankOptions) -> Call[RankAnswer]:
    """Ask for the scores of a request's candidates."""
    fields = asdict(request) if isinstance(request, ScoreRequest) else request
    given = {name: value for name, value in fields.items() if value is not None}
    beside = {name: value for name, value in options.items() if name != "member"}
    headers = {}
    if "member" in options:
        digest = hashlib.sha256(options["member"].encode("utf-8", "surrogatepass"))
        headers = {SESSION_HEADER: digest.hexdigest()}
    return Call(path="/v1/rank", answer=RankAnswer, body={**given, **beside}, headers=headers)


def rerank_call(
    query: str, documents: Sequence[str | Mapping[str, Any]], options: RerankOptions
) -> Call[RerankAnswer]:
    """Ask for the relevance of documents."""
    body = {"query": query, "documents": list(documents), **options}
    return Call(path="/v1/rerank", answer=RerankAnswer, body=body)


def score_call(
    query: str | Sequence[int],
    items: Sequence[str] | Sequence[Sequence[int]],
    options: ScoreOptions,
) -> Call[ScoreAnswer]:
    """Ask for the probabilities of labels after query and item."""
    body = {"query": query, "items": list(items), **options}
    return Call(path="/v1/score", answer=ScoreAnswer, body=body)


def completion_call(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    options: CompletionOptions,
) -> Call[CompletionAnswer]:
    """Ask for the next token of prompts."""
    body = {"prompt": prompt, "max_tokens": 1, **options}
    return Call(path="/v1/completions", answer=CompletionAnswer, body=body)


def chat_call(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> Call[ChatAnswer]:
    """Ask for the first token of the answer to a conversation."""
    body = {"messages": list(messages), "max_completion_tokens": 1, **options}
    return Call(path="/v1/chat/completions", answer=ChatAnswer, body=body)


MODELS = Call(path="/v1/models", answer=ModelList)


class Client:
    """Asks a server and waits for its answers; safe to share between threads.

    Args:
        config: how it asks.

    Every method raises ``ServerError`` where there is no answer: its ``status``, ``code`` and
    ``param`` say why.
    """

    def __init__(self, config: ClientConfig | None = None) -> None:
        self.config = config or ClientConfig()
        self._http = _import_httpx().Client(**_options(self.config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def rank(
        self, request: ScoreRequest | Mapping[str, Any], **options: Unpack[RankOptions]
    ) -> RankAnswer:
        """Score the candidates of one request."""
        return self.send(rank_call(request, options))

    def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping[str, Any]],
        **options: Unpack[RerankOptions],
    ) -> RerankAnswer:
        """Order documents by relevance."""
        return self.send(rerank_call(query, documents, options))

    def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[ScoreOptions],
    ) -> ScoreAnswer:
        """Get the probabilities of labels after query and item."""
        return self.send(score_call(query, items, options))

    def complete(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        **options: Unpack[CompletionOptions],
    ) -> CompletionAnswer:
        """Read the next token of one or many prompts."""
        return self.send(completion_call(prompt, options))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> ChatAnswer:
        """Read the first token of the answer to a conversation."""
        return self.send(chat_call(messages, options))

    def models(self) -> ModelList:
        """List the models and adapters."""
        return self.send(MODELS)

    def send(self, call: Call[Answer]) -> Answer:
        """Send a call, again where the server says that it may."""
        call = call.with_model(self.config.model)
        num_retries = 0
        while True:
            try:
                response = self._http.request(
                    _method(call), call.path, json=call.body, headers=call.headers
                )
            except _import_httpx().TransportError as error:
                raise _unreachable(self.config, error) from error
            wait_s = _wait_s(response, num_retries, self.config)
            if wait_s is None:
                return _read(response, call.answer)
            time.sleep(wait_s)
            num_retries += 1


class AsyncClient:
    """The same for an event loop: every method of ``Client``, awaited."""

    def __init__(self, config: ClientConfig | None = None) -> None:
        self.config = config or ClientConfig()
        self._http = _import_httpx().AsyncClient(**_options(self.config))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def rank(
        self, request: ScoreRequest | Mapping[str, Any], **options: Unpack[RankOptions]
    ) -> RankAnswer:
        """Score the candidates of one request."""
        return await self.send(rank_call(request, options))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping[str, Any]],
        **options: Unpack[RerankOptions],
    ) -> RerankAnswer:
        """Order documents by relevance."""
        return await self.send(rerank_call(query, documents, options))

    async def score(
        self,
        query: str | Sequence[int],
        items: Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[ScoreOptions],
    ) -> ScoreAnswer:
        """Get the probabilities of labels after query and item."""
        return await self.send(score_call(query, items, options))

    async def complete(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        **options: Unpack[CompletionOptions],
    ) -> CompletionAnswer:
        """Read the next token of one or many prompts."""
        return await self.send(completion_call(prompt, options))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> ChatAnswer:
        """Read the first token of the answer to a conversation."""
        return await self.send(chat_call(messages, options))

    async def models(self) -> ModelList:
        """List the models and adapters."""
        return await self.send(MODELS)

    async def send(self, call: Call[Answer]) -> Answer:
        """Send a call, again where the server says that it may."""
        import anyio  # what httpx itself waits with, on asyncio and on trio

        call = call.with_model(self.config.model)
        num_retries = 0
        while True:
            try:
                response = await self._http.request(
                    _method(call), call.path, json=call.body, headers=call.headers
                )
            except _import_httpx().TransportError as error:
                raise _unreachable(self.config, error) from error
            wait_s = _wait_s(response, num_retries, self.config)
            if wait_s is None:
                return _read(response, call.answer)
            await anyio.sleep(wait_s)
            num_retries += 1


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise MissingDependencyError("httpx", extra="client") from error
    return httpx


def _options(config: ClientConfig) -> dict[str, Any]:
    headers = {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}
    return {"base_url": config.url, "timeout": config.timeout_s, "headers": headers}


def _method(call: Call[Any]) -> str:
    return "GET" if call.body is None else "POST"


def _wait_s(response: "httpx.Response", num_retries: int, config: ClientConfig) -> float | None:
    """Say how long to wait before the next try; ``None`` takes the answer as it is."""
    if response.status_code not in _LATER or num_retries >= config.max_retries:
        return None
    wait_s = read_retry_after(response.headers.get("Retry-After"))
    if wait_s is None:
        # Twice as long each time; spread, so that clients do not come back together.
        wait_s = min(0.5 * 2**num_retries, config.max_wait_s) * random.uniform(0.5, 1.0)
    return wait_s if wait_s <= config.max_wait_s else None


def read_retry_after(value: str | None) -> float | None:
    """Read seconds or a date (RFC 9110, 10.2.3) as seconds from now; ``None`` for others."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read(response: "httpx.Response", answer: type[Answer]) -> Answer:
    if response.status_code == 200:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            message = f"{response.url} gave no {answer.__name__}; is it a RankOnce server?"
            raise ServerError(message, status=200) from error
    try:
        fault = ErrorAnswer.model_validate_json(response.content).error
    except ValidationError:
        message = f"{response.url} gave {response.status_code}: {response.text[:200]}"
        raise ServerError(message, status=response.status_code) from None
    raise ServerError(
        fault.message, status=response.status_code, code=fault.code, param=fault.param
    )


def _unreachable(config: ClientConfig, error: Exception) -> ServerError:
    return ServerError(f"{config.url}: {type(error).__name__}: {error}", status=None)
