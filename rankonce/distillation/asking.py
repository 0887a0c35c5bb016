"""Asking a teacher for what a store does not hold yet, and putting it beside the labels."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rankonce.distillation.store import Cost, ScoreStore, score_keys
from rankonce.distillation.teachers import Teacher, TeacherScores
from rankonce.errors import (
    DataError,
    RankOnceError,
    RequestError,
    ServerError,
    TrainingError,
)
from rankonce.prompts.tasks import Task, find_task
from rankonce.records import ScoreRequest, TrainingExample

# What is lost at most when a process is killed.
_SECONDS_PER_WRITE = 2.0
# A server that packs other requests into its passes answers within this; other weights do not.
_TOLERANCE = 0.25


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Candidates of a request that a store has no scores of.

    Attributes:
        source: where the request was read.
        request: the request with these candidates alone.
        places: of these candidates in the whole request.
        keys: of their scores.
    """

    source: str
    task: Task
    request: ScoreRequest
    places: tuple[int, ...]
    keys: tuple[bytes, ...]


def fill_store(
    store: ScoreStore,
    teacher: Teacher,
    examples: Sequence[TrainingExample],
    tasks: Mapping[str, Task],
) -> Cost:
    """Ask a teacher for the candidates of examples that a store has no scores of.

    Answers are kept as they come: a process that is killed goes on where it stood. Processes that
    ask at the same time take turns, so that none asks for what another has just got.

    Returns:
        What it took now; nothing where all was there, and then the teacher was not even loaded.

    Raises:
        RankOnceError: the teacher has no answer, or its labels are not those of the task.
    """
    if not any(_questions(store, teacher, examples, tasks)):
        return Cost()
    total = Cost()
    with FileLock(f"{store.path}.lock"):
        questions = list(_questions(store, teacher, examples, tasks))
        if not questions:
            return total
        store.register(teacher.fingerprint, name=teacher.name, served=teacher.describe())
        if teacher.can_change:
            total += _check_unchanged(store, teacher, examples, tasks)
        with _progress() as progress:
            bar = progress.add_task(f"asking {teacher.name}", total=len(questions))
            for part in _group_by_task(questions):
                for cost in _ask(store, teacher, part):
                    total += cost
                    progress.update(bar, advance=cost.num_calls)
    return total


def add_scores(
    store: ScoreStore, teacher: str, examples: Sequence[TrainingExample], tasks: Mapping[str, Task]
) -> Iterator[TrainingExample]:
    """Put a teacher's scores beside the labels of examples.

    Args:
        teacher: its fingerprint.
    """
    for example in examples:
        task = find_task(example.request.task, tasks)
        keys = score_keys(teacher, task, example.request)
        yield replace(example, teacher=tuple(store.read(task, keys)))


def _questions(
    store: ScoreStore,
    teacher: Teacher,
    examples: Sequence[TrainingExample],
    tasks: Mapping[str, Task],
) -> Iterator[_Question]:
    asked: set[bytes] = set()
    for number, example in enumerate(examples, start=1):
        request = example.request
        task = find_task(request.task, tasks)
        keys = score_keys(teacher.fingerprint, task, request)
        known = store.read(task, keys)
        missing = [
            place
            for place, (key, found) in enumerate(zip(keys, known, strict=True))
            if found is None and key not in asked
        ]
        if not missing:
            continue
        if task.history is not None and task.history.policy == "similar":
            # There the history depends on all candidates.
            missing = list(range(len(keys)))
        asked.update(keys[place] for place in missing)
        yield _Question(
            source=example.place(number),
            task=task,
            request=replace(
                request, candidates=tuple(request.candidates[place] for place in missing)
            ),
            places=tuple(missing),
            keys=tuple(keys[place] for place in missing),
        )


def _group_by_task(questions: Sequence[_Question]) -> list[list[_Question]]:
    groups: dict[str, list[_Question]] = {}
    for question in questions:
        groups.setdefault(question.task.name, []).append(question)
    return list(groups.values())


def _ask(store: ScoreStore, teacher: Teacher, questions: Sequence[_Question]) -> Iterator[Cost]:
    """Ask questions of one task; give what each write took."""
    waiting: dict[bytes, Mapping[str, float]] = {}
    num_calls = num_tokens = num_answered = 0
    started = time.monotonic()

    def write() -> Cost:
        nonlocal waiting, num_calls, num_tokens, started
        cost = Cost(num_calls, len(waiting), num_tokens, time.monotonic() - started)
        store.write(teacher.fingerprint, questions[0].task, waiting, cost)
        waiting, num_calls, num_tokens, started = {}, 0, 0, time.monotonic()
        return cost

    answers = teacher.score([question.request for question in questions])
    try:
        for question, answer in zip(questions, answers, strict=True):
            waiting.update(zip(question.keys, _check(answer, question, teacher), strict=True))
            num_calls, num_tokens = num_calls + 1, num_tokens + answer.num_tokens
            num_answered += 1
            if time.monotonic() - started >= _SECONDS_PER_WRITE:
                yield write()
    except RankOnceError as error:
        # What was answered before is kept all the same.
        if waiting:
            write()
        if _is_of_request(error):
            raise DataError(_name_fault(error, questions[num_answered])) from error
        raise
    if waiting:
        yield write()


def _is_of_request(error: RankOnceError) -> bool:
    """Whether a question is at fault, rather than who was asked."""
    if isinstance(error, ServerError):
        return error.status in (400, 413)
    return isinstance(error, RequestError)


def _name_fault(error: RankOnceError, question: _Question) -> str:
    """Name the line, and the candidates by their places there."""

    def place(found: re.Match[str]) -> str:
        return f"candidates[{question.places[int(found[1])]}]"

    return f"{question.source}: the teacher: " + re.sub(r"\bcandidates\[(\d+)\]", place, str(error))


def _check(
    answer: TeacherScores, question: _Question, teacher: Teacher
) -> tuple[Mapping[str, float], ...]:
    task = question.task
    for one in answer.log_probs:
        if set(one) != set(task.label_names):
            raise TrainingError(
                f"labels: the teacher {teacher.name} scores {', '.join(one)} in task "
                f"{task.name!r}, the student learns {', '.join(task.label_names)}"
            )
    if len(answer.log_probs) != len(question.keys):
        raise TrainingError(
            f"teacher: {teacher.name} scored {len(answer.log_probs)} of {len(question.keys)} "
            "candidates"
        )
    return answer.log_probs


def _check_unchanged(
    store: ScoreStore,
    teacher: Teacher,
    examples: Sequence[TrainingExample],
    tasks: Mapping[str, Task],
) -> Cost:
    """Ask once more for something that is known, lest a store mixes two models' scores."""
    for example in examples:
        task = find_task(example.request.task, tasks)
        known = store.read(task, score_keys(teacher.fingerprint, task, example.request))
        if None in known:
            continue
        started = time.monotonic()
        (answer,) = teacher.score([example.request])
        differences = [
            abs(said[name] - before[name])
            for said, before in zip(answer.log_probs, known, strict=True)
            if before is not None
            for name in before.keys() & said.keys()
        ]
        if max(differences, default=0.0) > _TOLERANCE:
            raise DataError(
                f"store: {store.path} holds other scores of {teacher.name} than it gives now (a "
                f"log-probability differs by {max(differences):.2g}): name a new store"
            )
        return Cost(1, 0, answer.num_tokens, time.monotonic() - started)
    return Cost()


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
