"""The thread that runs the model, and those that read and write text.

While a pass runs, questions arrive; the next pass takes as many of them as fit, by the rules of
``turns``. How many may wait is bounded, and so is how long each of them may: what cannot be
answered in its time is refused and not computed, and what nobody waits for any more is dropped.

A model of this process runs one pass at a time. Another engine may take several, each with
questions of its own.
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

from rankonce.errors import EngineError
from rankonce.layout import TokenizedRequest
from rankonce.model.scoring import RawScores
from rankonce.ranker import Ranker
from rankonce.serving.failures import LaterError
from rankonce.serving.observations import (
    Observations,
    PassObserved,
    QueueObserved,
    Refusal,
    Stage,
)
from rankonce.serving.turns import Question, Turn, plan_turns

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Passes by whose fastest the remaining time of a question is judged.
_NUM_SPEEDS = 32
_MAX_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class BatcherConfig:
    """How questions wait.

    Attributes:
        max_wait_ms: how long the first question that waits gives others, which are being read, to
            join its pass. A pass that is full begins at once, and so does one that nobody else is
            on the way to.
        max_questions: admitted and not answered; more are refused with 429.
        max_queue_s: how long what is served before a question may take, at the best speed seen
            lately; a question that would wait longer is refused with 429, since its client will
            have given up.
        max_waiting_tokens: of the questions that wait; one that finds others waiting and would go
            beyond it is refused with 429.
        num_text_threads: threads that render, tokenise and write answers.
    """

    max_wait_ms: float = 5.0
    max_questions: int = 1024
    max_queue_s: float = 30.0
    max_waiting_tokens: int = 4_000_000
    num_text_threads: int = 2


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms a question is answered.

    Attributes:
        priority: lower ones are served first.
        deadline: the event loop's time after which nobody wants the answer, or ``None``.
        cache_salt: questions of different salts never share what is kept of a prefix.
    """

    priority: int = 0
    deadline: float | None = None
    cache_salt: str | None = None


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """A question and whoever waits for it, in whose context its stages are observed."""

    question: Question
    answer: "asyncio.Future[list[RawScores]]"
    context: Context = field(default_factory=copy_context)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What a pass did: who had a turn, what failed or is complete, and what was computed."""

    turns: list[tuple[Question, list[Turn]]]
    results: dict[Question, list[RawScores] | Exception]
    seen: PassObserved
    began: float


class Batcher:
    """Gives many questions their turn on a ranker, which is not safe to use from several threads.

    Args:
        ranker: used by this batcher alone while it runs; its scorer says how many passes it takes
            at one time.
        observations: told of stages, passes and refusals.
    """

    def __init__(
        self,
        ranker: Ranker,
        config: BatcherConfig | None = None,
        observations: Observations | None = None,
    ) -> None:
        self.config = config or BatcherConfig()
        self.observations = observations or Observations()
        self._scorer = ranker.scorer
        self._max_tokens = ranker.config.max_tokens_per_pass
        self._waiting: list[_Waiting] = []
        self._num_open = 0
        self._came = asyncio.Event()
        self._speeds: deque[float] = deque(maxlen=_NUM_SPEEDS)
        # Questions that take part in a pass now, and the lock under which they are chosen.
        self._in_pass: set[Question] = set()
        self._planning = threading.Lock()
        self._model_threads = ThreadPoolExecutor(self._scorer.num_passes, "rankonce-model")
        self._text_threads = ThreadPoolExecutor(self.config.num_text_threads, "rankonce-text")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take questions inside this context."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._scorer.num_passes)]
        try:
            yield
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for waiting in self._waiting:
                waiting.answer.cancel()
            self._model_threads.shutdown()
            self._text_threads.shutdown()

    @property
    def queue(self) -> QueueObserved:
        """What is under way now."""
        return QueueObserved(
            num_open=self._num_open,
            num_waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens(),
        )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a question as under way inside this context.

        Raises:
            LaterError: too many are.
        """
        if self._num_open >= self.config.max_questions:
            raise self._refuse_busy(f"{self._num_open} questions are under way")
        self._num_open += 1
        try:
            yield
        except asyncio.CancelledError:
            self.observations.on_refusal(Refusal.CLIENT_GONE)
            raise
        finally:
            self._num_open -= 1
            # Whoever waits for others to come may be the last now.
            self._came.set()

    async def run_text(
        self,
        function: Callable[..., Answer],
        *arguments: object,
        stage: Stage = Stage.TOKENISE,
    ) -> Answer:
        """Run what reads or writes text beside the event loop, as part of a stage."""
        loop, began = asyncio.get_running_loop(), perf_counter()
        answer = await loop.run_in_executor(self._text_threads, function, *arguments)
        self.observations.on_stage(stage, perf_counter() - began)
        return answer

    async def run_between_passes(
        self, function: Callable[..., Answer], *arguments: object
    ) -> Answer:
        """Run what changes the model or its caches while no pass of this process runs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model_threads, function, *arguments)

    async def forward(
        self,
        requests: Sequence[TokenizedRequest],
        *,
        label_mass: bool = False,
        num_top: int = 0,
        terms: Terms | None = None,
    ) -> list[RawScores]:
        """Run tokenised requests of one adapter as ``Ranker.forward`` does, among all that wait.

        Raises:
            LaterError: too many tokens wait (429), or the deadline cannot be met (503).
        """
        loop, terms = asyncio.get_running_loop(), terms or Terms()
        question = Question(
            requests=requests,
            whole=label_mass,
            num_top=num_top,
            priority=terms.priority,
            deadline=terms.deadline,
            arrived=loop.time(),
        )
        waiting_tokens = self._waiting_tokens()
        if waiting_tokens and waiting_tokens + question.num_tokens > self.config.max_waiting_tokens:
            raise self._refuse_busy(f"{waiting_tokens} tokens wait")
        ahead_s = self._seconds_for(self._waiting_tokens(priority=terms.priority))
        if ahead_s > self.config.max_queue_s:
            raise self._refuse_busy(f"what waits already takes {ahead_s:.0f} s")
        waiting = _Waiting(question=question, answer=loop.create_future())
        self._waiting.append(waiting)
        self._came.set()
        timer = None
        if terms.deadline is not None:
            timer = loop.call_at(terms.deadline, self._refuse_late, waiting)
        try:
            return await waiting.answer
        finally:
            if timer is not None:
                timer.cancel()
            # Nobody waits for it any more, whether it is answered or given up.
            with suppress(ValueError):
                self._waiting.remove(waiting)

    def _waiting_tokens(self, *, priority: float = math.inf) -> int:
        """Count the tokens of what waits and is not after a priority."""
        waiting = (one.question for one in self._waiting if one.question.priority <= priority)
        return sum(question.left_tokens for question in waiting)

    def _seconds_for(self, num_tokens: int) -> float:
        """Estimate the seconds that tokens take; 0 before the first pass."""
        speed = max(self._speeds, default=0.0)
        return num_tokens / speed if speed else 0.0

    def _seconds_left(self) -> float:
        """Estimate the seconds until what waits now is computed."""
        return min(_MAX_RETRY_S, self._seconds_for(self._waiting_tokens()) or 1.0)

    def _refuse_busy(self, reason: str) -> LaterError:
        self.observations.on_refusal(Refusal.QUEUE_FULL)
        message = f"the server is busy: {reason}"
        return LaterError(429, message, code="queue_full", wait_s=self._seconds_left())

    def _refuse_late(self, waiting: _Waiting) -> None:
        if not waiting.answer.done():
            self.observations.on_refusal(Refusal.DEADLINE)
            waiting.answer.set_exception(
                LaterError(
                    503,
                    "timeout_ms: the answer would come too late, so it is not computed",
                    code="deadline_exceeded",
                    wait_s=self._seconds_left(),
                )
            )

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            self._refuse_hopeless()
            by_question = {waiting.question: waiting for waiting in self._free()}
            if not by_question:
                continue
            try:
                outcome = await loop.run_in_executor(
                    self._model_threads, self._run, list(by_question)
                )
            except Exception as error:  # a bug; those who wait should hear of it
                logger.exception("a pass could not be planned or read")
                for waiting in by_question.values():
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            if outcome is None:
                continue
            self._record(outcome)
            now = loop.time()
            for question, _ in outcome.turns:
                question.since = now
                if question.started is None:
                    question.started = now - outcome.seen.seconds
            for question, result in outcome.results.items():
                self._answer(by_question[question], result, now)
            # What was cut waits for its next turn, with whoever is idle.
            self._in_pass -= {question for question, _ in outcome.turns}
            self._came.set()

    async def _gather(self) -> None:
        """Return when there is something to compute, and nobody else to be waited for."""
        loop = asyncio.get_running_loop()
        while True:
            live = self._free()
            self._came.clear()
            timeout = None
            if live:
                tokens = sum(waiting.question.left_tokens for waiting in live)
                until = min(one.question.since for one in live) + self.config.max_wait_ms / 1000
                timeout = until - loop.time()
                num_coming = self._num_open - len(self._in_pass) - len(live)
                is_full = tokens >= self._max_tokens or any(one.question.opened for one in live)
                if timeout <= 0 or is_full or num_coming <= 0:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._came.wait()

    def _refuse_hopeless(self) -> None:
        """Refuse what would not be done in time even if it were alone, at the best speed seen."""
        now, speed = asyncio.get_running_loop().time(), max(self._speeds, default=math.inf)
        for waiting in self._waiting:
            question = waiting.question
            deadline = question.deadline
            # Its prefix may be known by the time of its turn.
            if deadline is not None and now + question.candidate_tokens / speed > deadline:
                self._refuse_late(waiting)

    def _free(self) -> list[_Waiting]:
        """List what waits for a turn, and for an answer still."""
        return [
            waiting
            for waiting in self._waiting
            if not waiting.answer.done() and waiting.question not in self._in_pass
        ]

    def _run(self, questions: Sequence[Question]) -> _Outcome | None:
        """Plan and run one pass on a model's thread, unless others took all questions meanwhile."""
        began = perf_counter()
        with self._planning:
            free = [one for one in questions if one not in self._in_pass and not one.is_done]
            if not free:
                return None
            turns = plan_turns(free, self._scorer, max_tokens=self._max_tokens)
            taken = {question for question, _ in turns}
            self._in_pass |= taken
        try:
            return self._run_planned(turns, began)
        except Exception:
            self._in_pass -= taken
            raise

    def _run_planned(self, turns: Sequence[tuple[Question, list[Turn]]], began: float) -> _Outcome:
        parts = [(request, request.num_done) for _, own in turns for request, _ in own]
        failed = self._run_turns(turns)
        results: dict[Question, list[RawScores] | Exception] = dict(failed)
        for question, _ in turns:
            if question not in failed and question.is_done:
                results[question] = question.join()
        pieces = [request.pieces[-1] for request, before in parts if request.num_done > before]
        seen = PassObserved(
            num_requests=len(parts),
            num_candidates=sum(request.num_done - before for request, before in parts),
            computed_tokens=sum(piece.computed_tokens for piece in pieces),
            cached_tokens=sum(piece.cached_tokens for piece in pieces),
            max_tokens=self._max_tokens,
            seconds=perf_counter() - began,
            adapter=turns[0][0].adapter,
        )
        return _Outcome(turns=list(turns), results=results, seen=seen, began=began)

    def _run_turns(self, turns: Sequence[tuple[Question, list[Turn]]]) -> dict[Question, Exception]:
        try:
            self._scorer.run_pass([turn for _, own in turns for turn in own])
        except Exception as error:  # whatever it is, it belongs to the question that caused it
            if len(turns) == 1 or isinstance(error, EngineError):
                # An engine that is away would be asked in vain for each of them.
                return {question: error for question, _ in turns}
            # Not the message: it may quote what a member wrote.
            kind = type(error).__name__
            logger.warning("a pass of %d questions failed, each runs alone: %s", len(turns), kind)
            return {
                question: error
                for turn in turns
                for question, error in self._run_turns([turn]).items()
            }
        return {}

    def _record(self, outcome: _Outcome) -> None:
        self.observations.on_pass(outcome.seen)
        if outcome.seen.seconds > 0:
            self._speeds.append(outcome.seen.computed_tokens / outcome.seen.seconds)

    def _answer(self, waiting: _Waiting, result: list[RawScores] | Exception, now: float) -> None:
        question = waiting.question
        started = now if question.started is None else question.started
        observe = self.observations.on_stage
        waiting.context.run(observe, Stage.WAIT, started - question.arrived)
        waiting.context.run(observe, Stage.FORWARD, now - started)
        if waiting.answer.done():
            return
        if isinstance(result, Exception):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)
