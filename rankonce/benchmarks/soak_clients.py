"""The clients of a soak: what they ask, and what their answers are worth."""

import random
import time
from collections.abc import Sequence

import httpx

from rankonce.benchmarks.serve_load import JSON_HEADERS, Call
from rankonce.benchmarks.soak_supervision import Supervisor
from rankonce.benchmarks.soak_tally import Tally
from rankonce.benchmarks.soak_traffic import (
    FaultyQuestion,
    KnownQuestion,
    declare_too_much,
    send_too_much,
    vanish,
    write_faulty,
)

INVALID_SHARE = 0.1
VANISHING_SHARE = 0.05
TIMEOUT_S = 120.0
# Of the invalid ones; a body without a length costs as much as it has bytes.
_DECLARED_SHARE, _CHUNKED_SHARE = 0.1, 0.01


class Clients:
    """Sends questions of every kind and judges what comes back.

    Args:
        url: of the server.
        known: questions with their scores.
        tally: of what became of them.
        supervisor: knows when the server was down.
        draw: chooses kinds and questions.
        tolerance: of a log-probability.
        max_body_mb: what the server takes.
    """

    def __init__(
        self,
        url: str,
        known: Sequence[KnownQuestion],
        tally: Tally,
        supervisor: Supervisor,
        *,
        draw: random.Random,
        tolerance: float,
        max_body_mb: int,
    ) -> None:
        self._tally = tally
        self._url = url
        self._known = known
        self._faulty = write_faulty(known)
        self._supervisor = supervisor
        self._draw = draw
        self._tolerance = tolerance
        self._max_body_mb = max_body_mb

    async def send(self, client: httpx.AsyncClient, departure: float) -> None:
        """Send one question.

        Args:
            departure: the moment at which it was to be sent, from which its latency counts.
        """
        kind = self._draw.random()
        if kind < INVALID_SHARE:
            await self._send_faulty(client)
        elif kind < INVALID_SHARE + VANISHING_SHARE:
            await self._vanish()
        else:
            await self._send_known(client, departure)

    async def _send_known(self, client: httpx.AsyncClient, departure: float) -> None:
        question = self._draw.choice(self._known)
        sent = time.monotonic()
        answer = await _request(client, "POST", question.call)
        if answer is None:
            self._judge_silence("valid", sent)
        elif answer.status_code in (429, 503) and "retry-after" in answer.headers:
            self._tally.outcomes["valid: refused for load"] += 1
        elif answer.status_code != 200:
            self._tally.outcomes[f"valid: status {answer.status_code}"] += 1
            self._tally.blame(f"{question.form}: {answer.status_code}: {answer.text[:200]}")
        else:
            difference = question.difference(answer.json())
            if difference <= self._tolerance:
                self._tally.outcomes["valid: right"] += 1
                self._tally.worst_difference = max(self._tally.worst_difference, difference)
                self._tally.latencies_ms.append(1000 * (time.monotonic() - departure))
            else:
                self._tally.outcomes["valid: wrong"] += 1
                self._tally.num_wrong += 1
                self._tally.blame(f"{question.form}: log-probabilities differ by {difference:.2g}")

    async def _send_faulty(self, client: httpx.AsyncClient) -> None:
        kind, sent = self._draw.random(), time.monotonic()
        fault, expected = "too large a body", 413
        some = self._draw.choice(self._known).call
        status: int | None
        try:
            if kind < _DECLARED_SHARE:
                status = await declare_too_much(self._url, some)
            elif kind < _DECLARED_SHARE + _CHUNKED_SHARE:
                size = (self._max_body_mb + 1) * 1_000_000
                status = await send_too_much(self._url, some, num_bytes=size)
            else:
                question: FaultyQuestion = self._draw.choice(self._faulty)
                fault, expected = question.fault, question.status
                answer = await _request(client, question.method, question.call)
                status = None if answer is None else answer.status_code
        except OSError:
            status = None
        if status is None:
            self._judge_silence(f"invalid, {fault}", sent)
        elif status == expected:
            self._tally.outcomes["invalid: refused"] += 1
        elif status in (429, 503):
            self._tally.outcomes["invalid: refused for load"] += 1
        else:
            self._tally.outcomes[f"invalid: status {status}"] += 1
            self._tally.blame(f"{fault}: should be {expected}, was {status}")

    async def _vanish(self) -> None:
        sent = time.monotonic()
        try:
            await vanish(self._url, self._draw.choice(self._known).call, draw=self._draw)
        except OSError:
            self._judge_silence("vanishing", sent)
        else:
            self._tally.outcomes["vanished"] += 1

    def _judge_silence(self, kind: str, sent: float) -> None:
        """A question without an answer is excused if the server was down meanwhile."""
        if self._supervisor.was_down(sent, time.monotonic()):
            self._tally.outcomes[f"{kind.partition(',')[0]}: lost in an outage"] += 1
        else:
            self._tally.outcomes[f"{kind.partition(',')[0]}: no answer"] += 1
            self._tally.blame(f"{kind}: no answer, and the server was not down")


async def _request(client: httpx.AsyncClient, method: str, call: Call) -> httpx.Response | None:
    try:
        return await client.request(method, call.path, content=call.body, headers=JSON_HEADERS)
    except httpx.HTTPError:
        return None
