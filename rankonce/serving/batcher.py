"""The one thread that runs the model, and the one that reads and writes text.

Questions that wait at the same time go through ``Ranker.forward`` together: while a pass runs,
others arrive, and the next one takes as many of them as fill it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from rankonce.layout import TokenizedRequest
from rankonce.ranker import Ranker, RawScores

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What one question wants of the model."""

    requests: Sequence[TokenizedRequest]
    label_mass: bool
    num_top: int
    answer: "asyncio.Future[list[RawScores]]"

    @property
    def num_tokens(self) -> int:
        return sum(
            len(request.prefix_ids) + sum(map(len, request.segment_ids))
            for request in self.requests
        )


class Batcher:
    """Gives many questions their turn on a ranker, which is not safe to use from several threads.

    Args:
        ranker: used by this batcher alone while it runs.
    """

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self._waiting: asyncio.Queue[_Turn] = asyncio.Queue()
        self._model_thread = ThreadPoolExecutor(1, "rankonce-model")
        self._text_thread = ThreadPoolExecutor(1, "rankonce-text")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take questions inside this context."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker
            while not self._waiting.empty():
                self._waiting.get_nowait().answer.cancel()
            self._model_thread.shutdown()
            self._text_thread.shutdown()

    async def run_text(self, function: Callable[..., Answer], *arguments: object) -> Answer:
        """Run what reads or writes text beside the event loop, one call at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, function, *arguments)

    async def run_between_passes(
        self, function: Callable[..., Answer], *arguments: object
    ) -> Answer:
        """Run what changes the model or its caches while no pass runs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model_thread, function, *arguments)

    async def forward(
        self, requests: Sequence[TokenizedRequest], *, label_mass: bool = False, num_top: int = 0
    ) -> list[RawScores]:
        """Run tokenised requests as ``Ranker.forward`` does, with whatever else waits.

        ``mass_C`` and more than ``num_top`` tokens may be there because a neighbour wanted them.
        """
        answer: asyncio.Future[list[RawScores]] = asyncio.get_running_loop().create_future()
        turn = _Turn(requests=requests, label_mass=label_mass, num_top=num_top, answer=answer)
        self._waiting.put_nowait(turn)
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        max_tokens = self._ranker.config.max_tokens_per_pass
        while True:
            turns = [await self._waiting.get()]
            num_tokens = turns[0].num_tokens
            while num_tokens < max_tokens and not self._waiting.empty():
                turns.append(self._waiting.get_nowait())
                num_tokens += turns[-1].num_tokens
            outcomes = await loop.run_in_executor(self._model_thread, self._run, turns)
            for turn, outcome in zip(turns, outcomes, strict=True):
                if turn.answer.done():  # nobody waits for it any more
                    continue
                if isinstance(outcome, Exception):
                    turn.answer.set_exception(outcome)
                else:
                    turn.answer.set_result(outcome)

    def _run(self, turns: Sequence[_Turn]) -> list[list[RawScores] | Exception]:
        try:
            raws = iter(
                self._ranker.forward(
                    [request for turn in turns for request in turn.requests],
                    label_mass=any(turn.label_mass for turn in turns),
                    num_top=max(turn.num_top for turn in turns),
                )
            )
            return [[next(raws) for _ in turn.requests] for turn in turns]
        except Exception as error:  # whatever it is, it belongs to the question that caused it
            if len(turns) == 1:
                return [error]
            logger.warning("a pass of %d questions failed, each runs alone: %s", len(turns), error)
            return [outcome for turn in turns for outcome in self._run([turn])]
