"""What a server does to a question beside the model: text to tokens, JSON in and out.

Tokenisation is measured where it may run: on the event loop, in threads, in processes. While it
runs, a task on the loop wants to wake every millisecond; how late it wakes is what every other
question of the server would feel.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from rankonce.environment import describe_environment
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import find_task, library_tasks
from rankonce.prompts.token_cache import TokenCache
from rankonce.ranker import EMBEDDED_MODEL
from rankonce.records import Event, Item, ScoreRequest

_TASK = "movie-like"
_TICK_S = 0.001


@dataclass(frozen=True, kw_only=True)
class HotPathOptions:
    """What is measured.

    Attributes:
        tokenizer: folder of a tokenizer.
        num_requests: of each arm.
        num_candidates: of a request.
        prefix_tokens: the history is as long as this holds.
        rounds: of each arm; the best counts, since what else a machine does only ever adds.
    """

    tokenizer: str = str(EMBEDDED_MODEL)
    num_requests: int = 24
    num_candidates: int = 100
    prefix_tokens: int = 2048
    rounds: int = 5


def measure_hot_path(options: HotPathOptions, *, on_arm: Callable[[str], None]) -> dict[str, Any]:
    """Measure every arm.

    Args:
        on_arm: hears the name of each arm as it begins.

    Returns:
        Rates, stalls and seconds of every arm, with the environment.
    """
    requests = make_requests(options)
    workload = asdict(options)
    if options.tokenizer == str(EMBEDDED_MODEL):
        workload["tokenizer"] = "the embedded ranker's"
    return {
        "workload": workload,
        "tokenising": _measure_tokenising(options, requests, on_arm),
        "reading_ms": _time_json(_readers(requests[0]), options.rounds, on_arm),
        "writing_ms": _time_json(_writers(options.num_candidates), options.rounds, on_arm),
        "environment": describe_environment(),
    }


def make_requests(options: HotPathOptions) -> list[ScoreRequest]:
    """Make members with long histories over a catalogue of films with made-up titles."""
    chance = random.Random(0)
    words = ["Heat", "Night", "River", "Stone", "Paris", "Return", "Winter", "Silence", "Road"]
    genres = ["Action", "Drama", "Comedy", "Thriller", "Romance"]

    def film() -> Item:
        title = f"{' '.join(chance.choices(words, k=3))} ({1950 + chance.randrange(70)})"
        return Item(fields={"title": title, "genres": chance.sample(genres, 2)})

    catalogue = [film() for _ in range(5000)]
    # An event has some 13 tokens.
    num_events = options.prefix_tokens // 13
    return [
        ScoreRequest(
            task=_TASK,
            time=1_700_000_000,
            profile={"num_ratings": num_events, "like_share": 0.6},
            history=tuple(
                Event(item=chance.choice(catalogue), action="liked", time=1_600_000_000 + i)
                for i in range(num_events)
            ),
            candidates=tuple(chance.choices(catalogue, k=options.num_candidates)),
        )
        for _ in range(options.num_requests)
    ]


class _Tokeniser:
    """What a worker holds."""

    def __init__(self, folder: str, *, cached: bool) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        cache = TokenCache(100_000_000 if cached else 0)
        self._renderer = Renderer(TextEncoder(tokenizer, cache=cache), max_prompt_tokens=100_000)
        self._task = find_task(_TASK, library_tasks())
        history = self._task.history
        assert history is not None, "the task reads a history"
        long = history.model_copy(update={"max_tokens": 100_000, "max_events": None})
        self._task = self._task.model_copy(update={"history": long})

    def tokenise(self, request: ScoreRequest) -> Any:
        return self._renderer.render(self._task, request)


_in_process: _Tokeniser | None = None


def _begin_process(folder: str, cached: bool) -> None:
    global _in_process
    _in_process = _Tokeniser(folder, cached=cached)


def _tokenise_in_process(request: ScoreRequest) -> Any:
    assert _in_process is not None, "made when the process began"
    return _in_process.tokenise(request)


_EXECUTORS: dict[str, tuple[int, type[Executor] | None]] = {
    "event loop": (0, None),
    "1 thread": (1, ThreadPoolExecutor),
    "2 threads": (2, ThreadPoolExecutor),
    "4 threads": (4, ThreadPoolExecutor),
    "1 process": (1, ProcessPoolExecutor),
    "2 processes": (2, ProcessPoolExecutor),
}


def _measure_tokenising(
    options: HotPathOptions, requests: Sequence[ScoreRequest], on_arm: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Measure every arm once a round, so that what else the machine does meets all of them."""
    rounds: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        arms = {}
        for name, (workers, executor) in _EXECUTORS.items():
            for cached in (False, True):
                arm = f"{name}, ids {'known' if cached else 'new'}"
                pool, tokenise = _open_arm(options, workers, executor, cached)
                if pool is not None:
                    stack.enter_context(pool)
                arms[arm] = pool, tokenise
        for number in range(options.rounds + 1):
            for arm, (pool, tokenise) in arms.items():
                on_arm(f"{arm}, round {number} of {options.rounds}")
                one = asyncio.run(_run_round(pool, tokenise, requests))
                # The first round starts processes and, where ids are kept, makes them known.
                if number:
                    rounds.setdefault(arm, []).append(one)
    return {
        arm: {
            "requests_per_s": max(one["requests_per_s"] for one in own),
            "stall_p99_ms": min(one["stall_p99_ms"] for one in own),
            "stall_max_ms": min(one["stall_max_ms"] for one in own),
        }
        for arm, own in rounds.items()
    }


def _open_arm(
    options: HotPathOptions, workers: int, executor: type[Executor] | None, cached: bool
) -> tuple[Executor | None, Callable[[ScoreRequest], Any]]:
    if executor is ProcessPoolExecutor:
        pool = ProcessPoolExecutor(
            workers,
            mp_context=get_context("spawn"),
            initializer=_begin_process,
            initargs=(options.tokenizer, cached),
        )
        return pool, _tokenise_in_process
    tokenise = _Tokeniser(options.tokenizer, cached=cached).tokenise
    return (ThreadPoolExecutor(workers) if executor else None), tokenise


async def _run_round(
    pool: Executor | None, tokenise: Callable[[ScoreRequest], Any], requests: Sequence[ScoreRequest]
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late.append(time.perf_counter() - before - _TICK_S)

    async def one(request: ScoreRequest) -> None:
        if pool is None:
            await asyncio.sleep(0)
            tokenise(request)
        else:
            await loop.run_in_executor(pool, tokenise, request)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(5 * _TICK_S)
    late.clear()
    began = time.perf_counter()
    await _gather([partial(one, request) for request in requests])
    seconds = time.perf_counter() - began
    await asyncio.sleep(2 * _TICK_S)
    ticking.cancel()
    late.sort()
    return {
        "requests_per_s": len(requests) / seconds,
        "stall_p99_ms": 1000 * late[math.ceil(0.99 * len(late)) - 1],
        "stall_max_ms": 1000 * late[-1],
    }


async def _gather(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    await asyncio.gather(*(call() for call in calls))


def _readers(request: ScoreRequest) -> dict[str, Callable[[], Any]]:
    """Read the JSON of a request and check it, as the server does after the last byte."""
    from pydantic import TypeAdapter
    from pydantic_core import from_json

    body = json.dumps({k: v for k, v in asdict(request).items() if v is not None}).encode()
    check = TypeAdapter(ScoreRequest).validate_python
    readers: dict[str, Callable[[], Any]] = {
        "json": lambda: check(json.loads(body)),
        "pydantic_core": lambda: check(from_json(body, allow_inf_nan=False)),
    }
    if find_spec("orjson"):
        orjson = import_module("orjson")
        readers["orjson"] = lambda: check(orjson.loads(body))
    if find_spec("msgspec"):
        msgspec = import_module("msgspec")
        readers["msgspec"] = lambda: check(msgspec.json.decode(body))
    readers["checking alone"] = partial(check, json.loads(body))
    return readers


def _writers(num_candidates: int) -> dict[str, Callable[[], Any]]:
    """Write an answer of the form that ``/v1/rank`` has."""
    from pydantic import TypeAdapter
    from pydantic.dataclasses import dataclass as checked

    @checked
    class Row:
        index: int
        id: str | None
        rank: int
        value: float
        probabilities: dict[str, float]
        log_probs: dict[str, float]

    rows = [
        Row(
            i, str(i), i + 1, -0.1234567 * i, {"Yes": 0.4364, "No": 0.5636}, {"Yes": -0.8, "No": -1}
        )
        for i in range(num_candidates)
    ]
    adapter = TypeAdapter(list[Row])
    writers: dict[str, Callable[[], Any]] = {
        "json": lambda: json.dumps(adapter.dump_python(rows, mode="json")).encode(),
        "pydantic_core": lambda: adapter.dump_json(rows),
    }
    if find_spec("orjson"):
        orjson = import_module("orjson")
        writers["orjson"] = lambda: orjson.dumps(adapter.dump_python(rows, mode="json"))
    if find_spec("msgspec"):
        msgspec = import_module("msgspec")
        writers["msgspec"] = lambda: msgspec.json.encode(adapter.dump_python(rows, mode="json"))
    return writers


def _time_json(
    arms: dict[str, Callable[[], Any]], rounds: int, on_arm: Callable[[str], None]
) -> dict[str, float]:
    """Time calls; the best mean of a round, in milliseconds."""
    calls = 20
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds * 3):
        for name, call in arms.items():
            on_arm(name)
            began = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: 1000 * min(own) for name, own in seconds.items()}
