"""Labelled examples become units: read, mixed over tasks, tokenised, packed."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rankonce.errors import DataError, RankOnceError, TaskError
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model.packing import PackedBatch, pack_pass
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, find_task
from rankonce.records import TrainingExample, read_request

Target = tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """A request as token ids with what is to be learnt of every candidate.

    Attributes:
        targets: for each candidate a probability for each label, or ``None`` where the label is
            not known.
        grades: the labels' grades, or 1 for the one whose log-odds rank.
        ranking: how the task's ranking value comes from the probabilities.
        teacher: for each candidate a teacher's log-probability for each label, or ``None`` where
            it was not asked; ``None`` without a teacher.
    """

    tokens: TokenizedRequest
    targets: tuple[Target, ...]
    grades: tuple[float, ...]
    ranking: Literal["log_odds", "expected_grade"]
    teacher: tuple[Target, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, once, and of all segments."""
        return len(self.tokens.prefix_ids) + sum(map(len, self.tokens.segment_ids))

    @property
    def num_targets(self) -> int:
        """Candidates whose label is known, or what a teacher says of them."""
        return sum(target is not None or said is not None for target, said in self.lessons)

    @property
    def lessons(self) -> Iterator[tuple[Target, Target]]:
        """Target and teacher's log-probabilities of every candidate."""
        return zip(self.targets, self.teacher or repeat(None), strict=False)


@dataclass(frozen=True, kw_only=True)
class LabelGroup:
    """Score rows whose tasks have the same labels and ranking.

    Attributes:
        label_ids: for every label the token ids that count as it.
        rows_R: the rows among the pass's score rows.
        targets_RL: the probability of every label; NaN in rows that only a teacher labelled.
        slates_R: which request a row belongs to, from 0.
        grades_L: worth of every label.
        teacher_RL: a teacher's log-probabilities; NaN in rows that it was not asked of.
    """

    label_ids: tuple[tuple[int, ...], ...]
    rows_R: Tensor
    targets_RL: Tensor
    slates_R: Tensor
    grades_L: Tensor
    ranking: Literal["log_odds", "expected_grade"]
    teacher_RL: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Examples of one forward pass."""

    batch: PackedBatch
    groups: tuple[LabelGroup, ...]


def read_examples(path: Path) -> list[TrainingExample]:
    """Read JSON lines: a request and its ``labels``, one a candidate.

    A label is a name, or ``{"Yes": 0.7, "No": 0.3}``, or null where it is not known.

    Raises:
        DataError: names the line and the field.
    """
    examples = list(stream_examples(path))
    if not examples:
        raise DataError(f"{path}: should hold at least one example")
    return examples


def read_unlabelled(path: Path) -> list[TrainingExample]:
    """Read JSON lines of requests whose labels are not known, or are not to be looked at.

    Raises:
        DataError: names the line and the field.
    """
    examples = list(stream_examples(path, has_labels=False))
    if not examples:
        raise DataError(f"{path}: should hold at least one request")
    return examples


def stream_examples(path: Path, *, has_labels: bool = True) -> Iterator[TrainingExample]:
    """Read the same one at a time.

    Args:
        has_labels: otherwise every label is ``None``, whatever the line says.

    Raises:
        DataError: names the line and the field.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    source = f"{path}: line {number}"
                    try:
                        example = _read_example(json.loads(line), has_labels=has_labels)
                    except (json.JSONDecodeError, RecursionError, RankOnceError) as error:
                        raise DataError(f"{source}: {error}") from error
                    yield replace(example, source=source)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_example(data: Any, *, has_labels: bool) -> TrainingExample:
    if not isinstance(data, dict):
        raise DataError("should be a JSON object")
    labels = data.pop("labels", None)
    request = read_request(data)
    if not has_labels:
        return TrainingExample(request=request, labels=(None,) * len(request.candidates))
    if not isinstance(labels, list) or len(labels) != len(request.candidates):
        raise DataError(
            f"labels: should hold one label for each of {len(request.candidates)} candidates"
        )
    for label in labels:
        if not (label is None or isinstance(label, str | dict)):
            raise DataError(f"labels: should be names, null or shares by name, hold {label!r}")
    return TrainingExample(request=request, labels=tuple(labels))


def check_examples(examples: Iterable[TrainingExample], tasks: Mapping[str, Task]) -> None:
    """Check tasks and labels before a run is begun.

    Raises:
        DataError: names the file and the line, or the example, and what is wrong with it.
    """
    for number, example in enumerate(examples, start=1):
        try:
            names = find_task(example.request.task, tasks).label_names
            for label in example.labels:
                _target(label, names)
        except TaskError as error:
            raise DataError(f"{example.place(number)}: {error}") from error


def tokenize_examples(
    examples: Iterable[TrainingExample],
    renderer: Renderer,
    tasks: Mapping[str, Task],
    *,
    style_seed: int | None = None,
) -> Iterator[TokenizedExample]:
    """Render and tokenise, exactly as for scoring.

    Args:
        style_seed: draws a wording for every example among its task's own and its styles;
            ``None`` uses the task's own.

    Raises:
        DataError: names the file and the line, or the example, that cannot be rendered.
    """
    choose = WordingChoice(tasks, style_seed=style_seed)
    for number, example in enumerate(examples, start=1):
        try:
            yield _tokenize(example, renderer, choose(example.request.task))
        except RankOnceError as error:
            raise DataError(f"{example.place(number)}: {error}") from error


class WordingChoice:
    """Gives tasks by name, each time in one of its wordings.

    Args:
        style_seed: of the draws; ``None`` gives every task in its own wording.
    """

    def __init__(self, tasks: Mapping[str, Task], *, style_seed: int | None) -> None:
        self._tasks = tasks
        self._random = None if style_seed is None else Random(style_seed)
        self._wordings: dict[str, tuple[Task, ...]] = {}

    def __call__(self, name: str) -> Task:
        """Draw a wording of a task.

        Raises:
            TaskError: no task has this name.
        """
        if self._random is None:
            return find_task(name, self._tasks)
        if name not in self._wordings:
            self._wordings[name] = find_task(name, self._tasks).wordings()
        return self._random.choice(self._wordings[name])


def _tokenize(example: TrainingExample, renderer: Renderer, task: Task) -> TokenizedExample:
    return TokenizedExample(
        tokens=renderer.render(task, example.request).tokens,
        targets=tuple(_target(label, task.label_names) for label in example.labels),
        grades=task.grades,
        ranking=task.ranking.kind,
        teacher=None
        if example.teacher is None
        else tuple(
            None if said is None else tuple(said[name] for name in task.label_names)
            for said in example.teacher
        ),
    )


def _target(label: str | Mapping[str, float] | None, names: tuple[str, ...]) -> Target:
    if label is None:
        return None
    shares = {label: 1.0} if isinstance(label, str) else dict(label)
    if not shares or not set(shares) <= set(names) or not all(map(_is_number, shares.values())):
        raise TaskError(f"labels: should be of {', '.join(names)}, is {label!r}")
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise TaskError(f"labels: probabilities should be from 0 and sum to 1, are {label!r}")
    return tuple(shares.get(name, 0.0) for name in names)


def _is_number(share: object) -> bool:
    return isinstance(share, int | float) and not isinstance(share, bool)


def mix_tasks(
    examples: Sequence[TrainingExample], *, temperature: float, seed: int
) -> list[TrainingExample]:
    """Draw as many examples again, each task in proportion to its number to the power 1/T.

    At 1 every example comes once; above, small tasks come more often (Raffel et al. 2020, 3.5.2).
    A task's examples are drawn in a random order and anew when all have come. Several tasks come
    in a random order, so that the first examples, of which a tokenizer is made, are of all.

    Raises:
        DataError: the temperature is below 1.
    """
    if not temperature >= 1:
        raise DataError(f"temperature: should be 1 or more, is {temperature}")
    by_task: dict[str, list[TrainingExample]] = {}
    for example in examples:
        by_task.setdefault(example.request.task, []).append(example)
    if len(by_task) == 1:
        return list(examples)
    weights = np.array([len(part) for part in by_task.values()], dtype=np.float64)
    shares = weights ** (1 / temperature)
    # At 1 these are the tasks' own numbers, whatever the sum of their shares was rounded to.
    counts = np.floor(shares / shares.sum() * len(examples) + 1e-6).astype(np.int64)
    random = np.random.default_rng(seed)
    parts = [_draw_anew(part, random) for part in by_task.values()]
    turns = random.permutation(np.repeat(np.arange(len(parts)), counts))
    return [next(parts[turn]) for turn in turns.tolist()]


def _draw_anew(
    examples: Sequence[TrainingExample], random: np.random.Generator
) -> Iterator[TrainingExample]:
    while True:
        for place in random.permutation(len(examples)).tolist():
            yield examples[place]


def pack_examples(
    examples: Sequence[TokenizedExample], device: torch.device | str = "cpu"
) -> TrainingBatch:
    """Pack examples into one pass, each prefix computed once."""
    requests = [example.tokens for example in examples]
    parts = [
        PassPart(request=index, first=0, last=len(request.segment_ids), cached=False)
        for index, request in enumerate(requests)
    ]
    groups: dict[Any, tuple[list[int], list[Target], list[int], list[Target]]] = {}
    row = 0
    for example in examples:
        key = (example.tokens.label_ids, example.grades, example.ranking)
        rows, targets, slates, teacher = groups.setdefault(key, ([], [], [], []))
        slate = slates[-1] + 1 if slates else 0
        unknown = (math.nan,) * len(example.grades)
        for target, said in example.lessons:
            if target is not None or said is not None:
                rows.append(row)
                targets.append(target or unknown)
                slates.append(slate)
                teacher.append(said or unknown)
            row += 1

    def place(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    return TrainingBatch(
        batch=pack_pass(parts, requests, {}, keep_prefixes=False, device=device),
        groups=tuple(
            LabelGroup(
                label_ids=ids,
                rows_R=place(rows),
                targets_RL=place(targets),
                slates_R=place(slates),
                grades_L=place(grades),
                ranking=ranking,
                teacher_RL=place(teacher),
            )
            for (ids, grades, ranking), (rows, targets, slates, teacher) in groups.items()
            if rows
        ),
    )
