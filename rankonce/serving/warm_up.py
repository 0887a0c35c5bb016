"""The first questions, which the server asks itself: one of every kind that it answers.

They read the weights into memory, capture graphs, compile kernels and show that the model gives
numbers, before a client waits for that.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from rankonce.errors import RequestError, TaskError
from rankonce.prompts.spelling import FieldSpec
from rankonce.prompts.tasks import HistoryLines, Lines, Task, library_tasks
from rankonce.records import Event, Item
from rankonce.serving.engine import Engine
from rankonce.serving.rerank_shapes import RerankBody
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerativeScoringBody,
    RankBody,
    ScoreBody,
)

logger = logging.getLogger(__name__)

_VALUES: dict[str, Any] = {
    "text": "warm-up",
    "list": ["warm", "up"],
    "count": 7,
    "share": 0.5,
    "percentile": 50,
    "age": 86_400,
    "number": 1.0,
}
_NOW = 1_700_000_000
_NUM_CANDIDATES = 7
_TEXTS = [f"Warm-up, text {number}." for number in range(_NUM_CANDIDATES)]

Ask = Callable[[], Awaitable[object]]


async def warm_up(engine: Engine) -> None:
    """Ask questions of every kind, with every adapter, one after the other.

    A kind that this model cannot answer (a label that is not one token, no chat template) is left
    out with a line in the log.

    Raises:
        NumericsError: the model gives no numbers.
    """
    began = perf_counter()
    num_answers = 0
    for model in (engine.model_name, *engine.adapter_names):
        for kind, ask in _questions(engine, model):
            try:
                await ask()
                num_answers += 1
            except (RequestError, TaskError) as error:
                logger.info("warm-up: %s does not answer %s: %s", model, kind, error)
    logger.info("warm-up: %d questions in %.1f s", num_answers, perf_counter() - began)


def _questions(engine: Engine, model: str) -> Iterator[tuple[str, Ask]]:
    for task in choose_tasks(engine.ranker.tasks, pinned=engine.config.pinned_tasks):
        rank = rank_question(task, model=model)
        yield f"task {task.name}", partial(engine.rank, rank)
    rerank = RerankBody(query="warm-up", documents=_TEXTS, model=model)  # type: ignore[arg-type]
    yield "rerank", partial(engine.rerank, rerank)
    # Every vocabulary has a first token.
    score = ScoreBody(query="warm-up", items=_TEXTS, label_token_ids=[0], model=model)
    yield "score", partial(engine.score, score)
    generative = GenerativeScoringBody(
        query="warm-up", items=_TEXTS, label_token_ids=[0], model=model
    )
    yield "generative scoring", partial(engine.score_generatively, generative)
    completion = CompletionBody(prompt=_TEXTS, max_tokens=1, logprobs=5, model=model)
    yield "completions", partial(engine.complete, completion)
    chat = ChatBody.model_validate(
        {"messages": [{"role": "user", "content": "warm-up"}], "max_tokens": 1, "model": model}
    )
    yield "chat", partial(engine.chat, chat)


def choose_tasks(tasks: Mapping[str, Task], *, pinned: Sequence[str] = ()) -> list[Task]:
    """Choose the tasks that the operator wrote or pinned, and one of each kind of ranking value.

    The others of the library take the same way through the same kernels: only their words differ.
    """
    library = library_tasks()
    own = [task for name, task in tasks.items() if library.get(name) != task or name in pinned]
    kinds = {task.ranking.kind: task for task in reversed(list(library.values()))}
    return [*own, *(task for task in kinds.values() if task not in own)]


def rank_question(
    task: Task, *, model: str | None = None, num_candidates: int = _NUM_CANDIDATES
) -> RankBody:
    """Make a question for a task with every field filled in."""
    return RankBody(
        task=task.name,
        model=model,
        time=_NOW,
        profile=_fill(task.profile, 0),
        history=tuple(_events(task.history)) if task.history else (),
        candidates=tuple(
            Item(fields=_fill(task.candidate, number)) for number in range(num_candidates)
        ),
    )


def _events(history: HistoryLines) -> Iterator[Event]:
    actions = history.actions or ("seen",)
    for number in range(_NUM_CANDIDATES):
        yield Event(
            item=Item(fields=_fill(history, number)),
            action=actions[number % len(actions)],
            time=_NOW - 86_400 * (number + 1),
        )


def _fill(lines: Lines, number: int) -> dict[str, Any]:
    return {name: _value(spec, number) for name, spec in lines.fields.items()}


def _value(spec: FieldSpec, number: int) -> Any:
    value = _VALUES[spec.type]
    # Candidates that are one text would share a score.
    return f"{value} {number}" if spec.type == "text" else value
