"""Requests through the model on a question's terms, without the pairs whose results are kept."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rankonce.layout import TokenizedRequest
from rankonce.model.scoring import RawScores
from rankonce.serving.batcher import Batcher, Terms
from rankonce.serving.results import ResultCache


class _HasTerms(Protocol):
    """What every question may say of when it wants its answer."""

    @property
    def priority(self) -> int: ...
    @property
    def timeout_ms(self) -> int | None: ...


class Passes:
    """Admits questions and runs their requests, among all that wait.

    Args:
        batcher: gives every question its turn.
        results: the scores that are kept.
    """

    def __init__(self, batcher: Batcher, results: ResultCache) -> None:
        self._batcher = batcher
        self._results = results

    @contextmanager
    def admit(self, body: _HasTerms, cache_salt: str | None) -> Iterator[Terms]:
        """Count a question as under way and read its terms; its time runs from here."""
        deadline = None
        if body.timeout_ms is not None:
            deadline = asyncio.get_running_loop().time() + body.timeout_ms / 1000
        with self._batcher.admit():
            yield Terms(priority=body.priority, deadline=deadline, cache_salt=cache_salt)

    async def forward(
        self,
        requests: Sequence[TokenizedRequest],
        terms: Terms,
        *,
        label_mass: bool,
        num_top: int = 0,
    ) -> list[RawScores]:
        """Run requests through the model, without the pairs whose results are kept."""
        if not self._results.max_pairs or num_top:
            return await self._batcher.forward(
                requests, label_mass=label_mass, num_top=num_top, terms=terms
            )
        known = [self._results.look_up(request, whole=label_mass) for request in requests]
        missing = [one.missing for one in known if one.missing is not None]
        raws = iter(
            await self._batcher.forward(missing, label_mass=label_mass, terms=terms)
            if missing
            else ()
        )
        return [
            self._results.complete(one, next(raws) if one.missing else None, whole=label_mass)
            for one in known
        ]

    async def read_prefix(
        self, ids: tuple[int, ...], terms: Terms, *, adapter: str | None
    ) -> RawScores:
        """Leave a prefix in the prefix cache: a request whose one token asks for a score."""
        alone = TokenizedRequest(
            prefix_ids=ids,
            segment_ids=(ids[-1:],),
            label_ids=((0,),),
            adapter=adapter,
            cache_salt=terms.cache_salt,
        )
        (raw,) = await self._batcher.forward([alone], terms=terms)
        return raw
