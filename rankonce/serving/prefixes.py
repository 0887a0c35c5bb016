"""Prefixes that were prepared before their candidates came, by a handle."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass, replace

from rankonce.errors import RequestError
from rankonce.records import ScoreRequest
from rankonce.serving.failures import ServingError
from rankonce.serving.schemas import RankBody

# What a prepared prefix says of a request, so that the request itself may not.
_SAID_BY_PREFIX = ("task", "profile", "history", "examples", "time", "instruction")


@dataclass(frozen=True, kw_only=True)
class PreparedPrefix:
    """A request without candidates, and who may use it until when.

    Attributes:
        id: the handle; nobody guesses it.
        request: with the adapter that was chosen for it.
        cache_salt: of whoever prepared it; it is unknown to others.
        expires_at: in Unix seconds.
        num_tokens: of the prefix.
    """

    id: str
    request: ScoreRequest
    cache_salt: str | None
    expires_at: float
    num_tokens: int


class PreparedPrefixes:
    """Handles until they expire; the oldest go first when there are too many.

    A handle holds what was asked. The keys and values lie in the prefix cache like those of any
    other prefix: where they had to go, the prefix is computed again and the scores are the same.

    Args:
        max_handles: bound on the handles held.
        clock: gives Unix seconds.
    """

    def __init__(self, max_handles: int, *, clock: Callable[[], float] = time.time) -> None:
        self._max_handles = max_handles
        self._clock = clock
        self._handles: OrderedDict[str, PreparedPrefix] = OrderedDict()

    def add(
        self, request: ScoreRequest, *, cache_salt: str | None, ttl_s: float, num_tokens: int
    ) -> PreparedPrefix:
        """Make a handle that holds for ``ttl_s`` seconds."""
        prepared = PreparedPrefix(
            id=f"prefix-{secrets.token_hex(16)}",
            request=request,
            cache_salt=cache_salt,
            expires_at=self._clock() + ttl_s,
            num_tokens=num_tokens,
        )
        self._drop_expired()
        self._handles[prepared.id] = prepared
        while len(self._handles) > self._max_handles:
            self._handles.popitem(last=False)
        return prepared

    def find(self, handle: str, *, cache_salt: str | None) -> PreparedPrefix | None:
        """Find what a handle stands for; ``None`` if it expired, or never was the asker's."""
        prepared = self._handles.get(handle)
        if prepared is None or prepared.cache_salt != cache_salt:
            return None
        return prepared if prepared.expires_at > self._clock() else None

    def complete(
        self, body: RankBody, handle: str, *, cache_salt: str | None, leaving: Set[str]
    ) -> RankBody:
        """Put what was prepared in front of a request's candidates.

        Args:
            leaving: adapters that no new question finds.

        Raises:
            RequestError: the request says something that the prefix says.
            ServingError: there is no such prefix, or none any more.
        """
        for name in _SAID_BY_PREFIX:
            if getattr(body, name):
                raise RequestError(f"{name}: should be left out, since prefix says it")
        prepared = self.find(handle, cache_salt=cache_salt)
        if prepared is None or prepared.request.adapter in leaving:
            raise ServingError(
                404,
                "prefix: there is none with this id, or it has expired; prepare it again, or send "
                "the request whole",
                code="prefix_not_found",
            )
        said = {name: getattr(prepared.request, name) for name in _SAID_BY_PREFIX}
        adapter = prepared.request.adapter
        if body.adapter not in (None, adapter):
            raise RequestError(f"adapter: should be left out or {adapter!r}, as prefix says")
        return replace(body, **said, adapter=adapter)

    def drop(self, adapter: str) -> None:
        """Forget the handles of an adapter that goes."""
        for handle in [h for h, one in self._handles.items() if one.request.adapter == adapter]:
            del self._handles[handle]

    def __len__(self) -> int:
        return len(self._handles)

    def _drop_expired(self) -> None:
        now = self._clock()
        for handle in [h for h, prepared in self._handles.items() if prepared.expires_at <= now]:
            del self._handles[handle]
