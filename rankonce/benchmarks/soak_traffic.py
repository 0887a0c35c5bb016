"""What a soak sends: questions whose scores are known, faulty ones, and clients that vanish."""

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from rankonce.benchmarks.serve_arms import ARMS
from rankonce.benchmarks.serve_load import Call
from rankonce.benchmarks.serve_workloads import LoadRequest, LoadWorkload, LoadWriter
from rankonce.ranker import Ranker

# Small enough that half an hour holds tens of thousands of them.
SOAK_WORKLOAD = LoadWorkload(
    name="soak", prefix_tokens=512, num_candidates=20, candidate_tokens=32, has_task=True
)
_HUGE_BYTES = 10**9
_READ_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class KnownQuestion:
    """A question and the scores that its answer must hold.

    Attributes:
        form: the endpoint.
        read: log-probabilities by candidate and label, of the answer as JSON.
        expected: log-probabilities by candidate and label.
    """

    form: str
    call: Call
    read: Callable[[Any], list[list[float]]]
    expected: Sequence[Sequence[float]]

    def difference(self, answer: Any) -> float:
        """Greatest difference of a log-probability; infinite where one is missing."""
        try:
            found = self.read(answer)
        except (KeyError, TypeError, IndexError, ValueError):
            return math.inf
        if [len(row) for row in found] != [len(row) for row in self.expected]:
            return math.inf
        differences = [
            abs(one - other)
            for row, known in zip(found, self.expected, strict=True)
            for one, other in zip(row, known, strict=True)
        ]
        # NaN compares as nothing.
        return max(differences) if all(map(math.isfinite, differences)) else math.inf


@dataclass(frozen=True, kw_only=True)
class FaultyQuestion:
    """A question that must be refused.

    Attributes:
        fault: what is wrong with it.
        status: of the answer.
    """

    fault: str
    method: str
    call: Call
    status: int


def write_known(ranker: Ranker, *, count: int, seed: int) -> list[KnownQuestion]:
    """Write questions in the forms that tell scores, with the offline ranker's scores.

    Args:
        count: members; each asks in one form, in turn.
    """
    writer = LoadWriter(ranker, SOAK_WORKLOAD, seed=seed)
    forms = (_rank_question, _score_question, _completion_question)
    return [forms[number % len(forms)](writer, writer.write(number)) for number in range(count)]


def _rank_question(writer: LoadWriter, request: LoadRequest) -> KnownQuestion:
    names = request.label_names

    def read(answer: Any) -> list[list[float]]:
        results = sorted(answer["results"], key=lambda result: result["index"])
        return [[result["log_probs"][name] for name in names] for result in results]

    call = ARMS["rankonce rank"].ask(request)
    return KnownQuestion(
        form=call.path, call=call, read=read, expected=writer.score_offline(request)
    )


def _score_question(writer: LoadWriter, request: LoadRequest) -> KnownQuestion:
    def read(answer: Any) -> list[list[float]]:
        return [[math.log(share) for share in row] for row in answer["scores"]]

    call = ARMS["rankonce score"].ask(request)
    return KnownQuestion(
        form=call.path, call=call, read=read, expected=writer.score_offline(request)
    )


def _completion_question(writer: LoadWriter, request: LoadRequest) -> KnownQuestion:
    """Ask for log-probabilities in the whole vocabulary, where the labels have a share only."""
    words = [writer.ranker.model.tokenizer.decode([label]) for label in request.label_ids]
    body = {
        "prompt": [request.query + item for item in request.items],
        "max_tokens": 1,
        "logprobs": 1,
        "labels": words,
    }
    (raw,) = writer.ranker.forward([request.tokens], label_mass=True)
    assert raw.mass_C is not None
    expected: list[list[float]] = (raw.labels_CL + raw.mass_C[:, None]).tolist()

    def read(answer: Any) -> list[list[float]]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        return [[top[word] for word in words] for top in tops]

    call = Call(path="/v1/completions", body=json.dumps(body, ensure_ascii=False).encode())
    return KnownQuestion(form=call.path, call=call, read=read, expected=expected)


def write_faulty(known: Sequence[KnownQuestion]) -> list[FaultyQuestion]:
    """Write one question for every fault that a client may make.

    Args:
        known: hold one question of ``/v1/rank`` and one of ``/v1/score`` at least.
    """
    rank, score = (
        next(question.call for question in known if question.form == form)
        for form in ("/v1/rank", "/v1/score")
    )

    def faulty(
        fault: str, call: Call, status: int = 400, *, method: str = "POST", **changes: Any
    ) -> FaultyQuestion:
        changed = call
        if changes:
            body = {**json.loads(call.body), **changes}
            changed = replace(call, body=json.dumps(body).encode())
        return FaultyQuestion(fault=fault, method=method, call=changed, status=status)

    return [
        faulty("JSON cut short", replace(rank, body=rank.body[: len(rank.body) // 2])),
        faulty("no JSON", replace(score, body=b"\x00\xff not JSON")),
        faulty("a list, not an object", replace(rank, body=b"[]")),
        faulty("a number without a value", replace(rank, body=b'{"time": NaN}')),
        faulty("an unknown field", rank, canidates=[]),
        faulty("an unknown task", rank, task="no-such-task"),
        faulty("no candidates", rank, candidates=[]),
        faulty("a candidate that is no object", rank, candidates=[7]),
        faulty("no items", score, items=[]),
        faulty("a label that the model has not", score, label_token_ids=[10**6]),
        faulty("a label that is not one token", score, label_token_ids=None, labels=[" zzyzx qq"]),
        faulty("a prompt that is too long", score, query=" word" * 5_000),
        faulty("another model", rank, 404, model="no-such-model"),
        faulty("no such path", replace(rank, path="/v1/no-such-path"), 404),
        faulty("another method", replace(rank, body=b""), 405, method="GET"),
    ]


async def declare_too_much(url: str, call: Call) -> int | None:
    """Announce a body of a gigabyte and send its beginning.

    Returns:
        The status of the answer, ``None`` if none came.
    """
    reader, writer = await _connect(url)
    try:
        writer.write(_head(url, call, _HUGE_BYTES) + call.body)
        await writer.drain()
        return _status(await reader.read(_READ_BYTES))
    finally:
        await _close(writer)


async def send_too_much(url: str, call: Call, *, num_bytes: int) -> int | None:
    """Send a body in chunks that never told its length, until the server answers."""
    reader, writer = await _connect(url)
    answering = asyncio.create_task(reader.read(_READ_BYTES))
    chunk = b" " * 65_536
    try:
        writer.write(_head(url, call, None))
        with suppress(ConnectionError):
            for _ in range(num_bytes // len(chunk) + 1):
                if answering.done():
                    break
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
        return _status(await answering)
    finally:
        answering.cancel()
        await _close(writer)


async def vanish(url: str, call: Call, *, draw: random.Random) -> None:
    """Send a question, or a part of it, and go away without the answer."""
    _, writer = await _connect(url)
    try:
        whole = _head(url, call, len(call.body)) + call.body
        sent = whole if draw.random() < 0.7 else whole[: draw.randrange(len(whole))]
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(draw.expovariate(20))
    finally:
        await _close(writer)


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    # The server may have reset the connection already.
    with suppress(ConnectionError):
        await writer.wait_closed()


def _head(url: str, call: Call, num_bytes: int | None) -> bytes:
    length = "Transfer-Encoding: chunked" if num_bytes is None else f"Content-Length: {num_bytes}"
    lines = (
        f"POST {call.path} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        "Content-Type: application/json",
        length,
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _status(answer: bytes) -> int | None:
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None
