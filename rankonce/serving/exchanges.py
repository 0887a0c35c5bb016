"""One question and its answer, as logs, metrics, traces and limits see them."""

import functools
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from rankonce.serving.observations import Stage

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")

# What comes in goes into logs and back out in a header, so it may hold nothing that means
# something there.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """A stage that a question went through; ``end`` is by ``time.time``."""

    stage: Stage
    end: float
    seconds: float


@dataclass(kw_only=True)
class Exchange:
    """One question under way.

    Attributes:
        id: the request's, from ``X-Request-Id`` or made up.
        method, route: the template of the path, never what stands in it.
        owner: name of the API key, empty without one.
        body: what was sent, where the log should show it.
        num_bytes: of the body, held until the answer is there.
        num_tokens: of its prompts, once they are counted.
        code: why it failed, in a word, if it did.
        stages: in the order of their ends.
    """

    id: str
    method: str
    route: str = "unmatched"
    owner: str = ""
    body: str | None = None
    num_bytes: int = 0
    num_tokens: int | None = None
    code: str | None = None
    stages: list[StageSpan] = field(default_factory=list)
    began: float = field(default_factory=time.time)


_current: ContextVar[Exchange | None] = ContextVar("rankonce_exchange", default=None)


def current_exchange() -> Exchange | None:
    """Return the question that the running task answers; ``None`` outside of any."""
    return _current.get()


def current_salt() -> str | None:
    """Return what separates the caches of the running task's owner from those of others."""
    exchange = _current.get()
    return exchange.owner or None if exchange else None


def begin_exchange(method: str, request_id: str | None) -> Exchange:
    """Make a question the one that the running task answers.

    Args:
        request_id: as the client sent it; another one is made up where it cannot be used.
    """
    usable = request_id is not None and _REQUEST_ID.fullmatch(request_id)
    exchange = Exchange(id=request_id if usable and request_id else uuid.uuid4().hex, method=method)
    _current.set(exchange)
    return exchange


def count_tokens(
    answer: Callable[_Arguments, Awaitable[_Answer]],
) -> Callable[_Arguments, Awaitable[_Answer]]:
    """Note the tokens that the answers of a route give as their usage."""

    @functools.wraps(answer)
    async def counting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        answered = await answer(*args, **kwargs)
        exchange = current_exchange()
        usage: Any = getattr(answered, "usage", None)
        if exchange is not None and usage is not None:
            exchange.num_tokens = getattr(usage, "prompt_tokens", None)
        return answered

    return counting


def note_stage(stage: Stage, seconds: float) -> None:
    """Add a stage that has just ended to the question that the running task answers."""
    exchange = current_exchange()
    if exchange is not None:
        exchange.stages.append(StageSpan(stage=stage, end=time.time(), seconds=seconds))
