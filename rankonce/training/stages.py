"""Stages of a training run: what is read, how it becomes units, and what is learnt from these.

A source knows its data but no tokenizer yet: a ranker from scratch gets one that is trained on the
texts of all its stages.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from rankonce.errors import DataError, RankOnceError, TrainingError
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, find_task, library_tasks
from rankonce.records import TrainingExample
from rankonce.training.data import (
    TokenizedExample,
    WordingChoice,
    check_examples,
    mix_tasks,
    read_examples,
    read_unlabelled,
    tokenize_examples,
)
from rankonce.training.loop import TrainConfig, TrainingData
from rankonce.training.objectives import LabelObjective, Objective

# Prompts that a tokenizer is trained on.
_NUM_TOKENIZER_EXAMPLES = 2000

Tasks = Mapping[str, Task]


@dataclass(frozen=True, kw_only=True)
class StageSource:
    """The data of a stage before there is a tokenizer.

    Attributes:
        open: makes units with a renderer, whose encoder has the tokenizer.
        texts: a sample of what will be read, rendered, to train a tokenizer on.
        tasks: whose labels should be one token each.
        valid: labelled requests that a ranker may be measured on after the stage.
        fingerprint: says which data these are; a resumed run must have the same.
        split: tables that the data were cut into, where the recipe cut them.
        examples: those of an epoch, where labels are learnt: a teacher can be asked of them.
        style_seed: of the wordings that they come in; see ``label_source``.
        objective: what is learnt of the data and how; a resumed run must do the same.
    """

    open: Callable[[Renderer], TrainingData]
    texts: Callable[[Renderer], Iterable[str]]
    tasks: Sequence[Task] = ()
    valid: Sequence[TrainingExample] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    examples: Callable[[int], Iterable[TrainingExample]] | None = None
    style_seed: int | None = None
    objective: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: of the stage, once in a recipe: ``pretrain``, ``instruct``, ``finetune`` …
        load: reads the data from a folder or file; ``None`` where the stage has none there, so that
            it is left out.
    """

    name: str
    load: Callable[[Path, TrainConfig, Tasks], StageSource | None]
    config: TrainConfig = field(default_factory=TrainConfig)


def first_examples(stage: Stage, folder: Path, tasks: Sequence[Task]) -> list[TrainingExample]:
    """Read the labelled requests of a stage's first epoch.

    Args:
        tasks: beside those of the library.

    Raises:
        TrainingError: the stage learns no labels, or has nothing in the folder.
    """
    known = {**library_tasks(), **{task.name: task for task in tasks}}
    source = stage.load(folder, stage.config, known)
    if source is None or source.examples is None:
        raise TrainingError(f"data: {folder} should hold labelled requests for {stage.name}")
    return list(source.examples(0))


def label_source(
    epoch: Callable[[int], Iterable[TrainingExample]],
    *,
    tasks: Tasks,
    valid: Sequence[TrainingExample] = (),
    losses: Mapping[str, float] | None = None,
    objective: Objective[Any] | None = None,
    fingerprint: Mapping[str, Any],
    split: Mapping[str, pl.DataFrame] | None = None,
    settings: Mapping[str, Any] | None = None,
    style_seed: int | None = None,
) -> StageSource:
    """Make the source of a stage that learns labels at score rows.

    Args:
        epoch: the examples of an epoch.
        settings: of how they are made, for the record; a resumed run must have the same.
        tasks: by name, those of the examples among them.
        losses: weights of losses of the table; cross-entropy alone by default.
        objective: takes the place of the losses.
        style_seed: each example of an epoch comes in a wording drawn from its task's own and its
            styles; ``None`` uses the task's own, as the valid examples always do.

    Raises:
        DataError: an epoch has no examples, or one of them does not fit its task.
    """
    learnt = objective or LabelObjective(losses=losses or {"softmax": 1.0})
    first = list(epoch(0))
    if not first:
        raise DataError("data: should hold a labelled request to learn from, holds none")
    check_examples(first, tasks)
    check_examples(valid, tasks)
    names = sorted({example.request.task for example in (*first, *valid)})
    if style_seed is not None and not any(find_task(name, tasks).styles for name in names):
        raise DataError(f"styles: should be left out: {', '.join(names)} has no other wording")

    def open_with(renderer: Renderer) -> TrainingData:
        return TrainingData(
            units=label_units(epoch, renderer, tasks, style_seed=style_seed),
            objective=learnt,
            valid=lambda: tokenize_examples(valid, renderer, tasks),
        )

    def texts(renderer: Renderer) -> Iterable[str]:
        choose = WordingChoice(tasks, style_seed=style_seed)
        for number, example in enumerate(islice(first, _NUM_TOKENIZER_EXAMPLES), start=1):
            try:
                rendered = renderer.render(choose(example.request.task), example.request)
            except RankOnceError as error:
                raise DataError(f"{example.place(number)}: {error}") from error
            yield rendered.prefix.removeprefix(renderer.encoder.head)
            yield from rendered.segments

    return StageSource(
        open=open_with,
        texts=texts,
        tasks=[find_task(name, tasks) for name in names],
        valid=valid,
        fingerprint={**fingerprint, **({} if style_seed is None else {"style_seed": style_seed})},
        split=split or {},
        examples=epoch,
        style_seed=style_seed,
        objective={"labels": repr(learnt), **(settings or {})},
    )


def label_units(
    epoch: Callable[[int], Iterable[TrainingExample]],
    renderer: Renderer,
    tasks: Tasks,
    *,
    style_seed: int | None,
) -> Callable[[int], Iterable[TokenizedExample]]:
    """Make the units of an epoch from its examples; arguments as in ``label_source``."""
    return lambda number: tokenize_examples(
        epoch(number),
        renderer,
        tasks,
        style_seed=None if style_seed is None else 1000 * style_seed + number,
    )


def finetune_source(
    paths: Sequence[Path],
    config: TrainConfig,
    tasks: Tasks,
    *,
    valid_paths: Sequence[Path] = (),
    temperature: float = 1.0,
    losses: Mapping[str, float] | None = None,
    styles: bool = False,
    unlabelled_paths: Sequence[Path] = (),
) -> StageSource:
    """Read JSON lines of labelled requests of any tasks.

    Args:
        unlabelled_paths: JSON lines of requests; labels in them are not looked at.
        temperature: evens out how often tasks come; see ``mix_tasks``.
        styles: draw a wording for every example; see ``label_source``.

    Raises:
        DataError: names the file, the line and the field.
    """
    rows = [example for path in paths for example in read_examples(path)]
    rows += [example for path in unlabelled_paths for example in read_unlabelled(path)]
    valid = [example for path in valid_paths for example in read_examples(path)]

    def epoch(number: int) -> Iterable[TrainingExample]:
        return mix_tasks(rows, temperature=temperature, seed=config.seed + number)

    return label_source(
        epoch,
        tasks=tasks,
        valid=valid,
        losses=losses,
        fingerprint={
            **fingerprint_files([*paths, *unlabelled_paths, *valid_paths]),
            "temperature": temperature,
        },
        style_seed=config.seed if styles else None,
    )


def fingerprint_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file by its name.

    Raises:
        DataError: a file cannot be read, or two have one name.
    """
    found: dict[str, str] = {}
    for path in paths:
        name = path.name if path.name not in found else str(path)
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return found
