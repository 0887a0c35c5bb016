"""Recipes: functions that say what is trained, on what and how, each with its defaults."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rankonce.datasets.ml_small import add_passed_over, read_ml_small, split_each_member
from rankonce.datasets.movielens import movie_examples, movie_rows, read_rows
from rankonce.datasets.statistics import read_whole_numbers
from rankonce.errors import DataError
from rankonce.model.loading import load_model
from rankonce.model.sizes import CONTEXT_TOKENS, build_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, find_task, library_tasks
from rankonce.records import TrainingExample
from rankonce.training.checkpoint import latest_checkpoint
from rankonce.training.data import read_examples
from rankonce.training.loop import TrainConfig, TrainingData, train
from rankonce.training.tokenizer import train_tokenizer

# Where in the train rows the present of an epoch may lie.
_PRESENT_SHARE = (0.2, 0.8)
# Titles and events that an epoch leaves out: 34,000 labels are learnt by heart otherwise.
_FORGETTING = 0.8
# Part of a label that is what the averages lead one to expect.
_SMOOTHING = 0.7
# Of every member's rows, the newest.
HELD_OUT_SHARE = 0.1
_PASSED_OVER_PER_LIKE = 1
# Prompts that a tokenizer is trained on.
_NUM_TOKENIZER_EXAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``rankonce train`` runs.

    Attributes:
        load: reads the data from a folder or file.
        size: the size to build where no checkpoint is given.
    """

    name: str
    description: str
    load: Callable[[Path, TrainConfig], TrainingData]
    size: str
    config: TrainConfig = field(default_factory=TrainConfig)


def ml1m() -> Recipe:
    """MovieLens-1M in CoLLM's split: ``train.parquet``, ``valid.parquet``, ``items.parquet``."""
    return Recipe(
        name="ml1m",
        description="will the member like the film; MovieLens-1M, CoLLM's split by time",
        load=_load_ml1m,
        size="1m",
        config=TrainConfig(
            epochs=4, labels_per_step=64, learning_rate=1.5e-3, dropout=0.1, averaging=0.99, seed=1
        ),
    )


def ml_small() -> Recipe:
    """MovieLens latest-small with films that members passed over; makes the embedded ranker."""
    return Recipe(
        name="ml-small",
        description="which films does the member pick and like; MovieLens latest-small",
        load=_load_ml_small,
        size="1m",
        config=TrainConfig(
            epochs=2, labels_per_step=128, learning_rate=1.5e-3, dropout=0.1, seed=1
        ),
    )


def examples() -> Recipe:
    """Training examples of any task in a file of JSON lines."""
    return Recipe(
        name="examples",
        description="JSON lines of requests with their labels, for any task",
        load=_load_examples,
        size="3m",
        config=TrainConfig(learning_rate=1e-3),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "ml1m": ml1m,
    "ml-small": ml_small,
    "examples": examples,
}


def run_recipe(
    recipe: Recipe, data: Path, out: Path, *, model: str | None = None, tasks: Iterable[Task] = ()
) -> None:
    """Train by a recipe, from a checkpoint or from random weights.

    Args:
        model: a checkpoint to start from; without one a tokenizer is trained on the data and a
            model of the recipe's size is built.

    Raises:
        RankOnceError: the data, the checkpoint or the output folder cannot be used.
    """
    known = {**library_tasks(), **{task.name: task for task in tasks}}
    loaded = recipe.load(data, recipe.config)
    first = list(loaded.epoch(0))
    used = [find_task(name, known) for name in sorted({e.request.task for e in first})]
    newest = latest_checkpoint(out)
    if model is not None:
        start = load_model(model, precision="fp32")
        network, tokenizer, limit = start.network, start.tokenizer, start.max_prompt_tokens
    else:
        network, limit = build_model(recipe.size, seed=recipe.config.seed), CONTEXT_TOKENS
        # A resumed run keeps its tokens: the weights were trained on them.
        tokenizer = (
            AutoTokenizer.from_pretrained(newest[1]) if newest else _tokenizer_for(first, used)
        )
    train(
        network,
        tokenizer,
        loaded,
        out,
        tasks=known,
        config=recipe.config,
        max_prompt_tokens=limit,
        record={
            "recipe": recipe.name,
            "tasks": {
                task.name: hashlib.sha256(task.model_dump_json().encode()).hexdigest()
                for task in used
            },
            "size": recipe.size if model is None else None,
            "model": model,
        },
    )


def _load_ml1m(folder: Path, config: TrainConfig) -> TrainingData:
    names = ("train.parquet", "valid.parquet", "items.parquet")
    train_rows, valid_rows, items = (read_rows(folder / name) for name in names)
    moments = np.sort(read_whole_numbers(train_rows, "timestamp"))

    def epoch(number: int) -> Iterable[TrainingExample]:
        # A ranker serves what comes after the statistics that it is told were counted. Every epoch
        # plays that with another day as the present: the rows after it, as seen from it. Rows
        # described by statistics of their own day would teach it to trust what it never gets.
        seed = 1000 * config.seed + number
        share = np.random.default_rng(seed).uniform(*_PRESENT_SHARE)
        present = moments[int(share * len(moments))]
        before = train_rows.filter(pl.col("timestamp") < present)
        after = train_rows.filter(pl.col("timestamp") >= present)
        movies = movie_rows(after, items, train=before)
        return movie_examples(
            movies,
            candidates_per_example=24,
            seed=seed,
            forgetting=_FORGETTING,
            smoothing=_SMOOTHING,
        )

    held_out = movie_rows(valid_rows, items, train=train_rows)
    return TrainingData(
        epoch=epoch,
        valid=list(movie_examples(held_out, candidates_per_example=24)),
        fingerprint={name: fingerprint(folder / name) for name in names},
    )


def _load_ml_small(folder: Path, config: TrainConfig) -> TrainingData:
    ratings, items = read_ml_small(folder)
    train_rows, valid_rows = split_each_member(ratings, held_out_share=HELD_OUT_SHARE)

    def epoch(number: int) -> Iterable[TrainingExample]:
        seed = 1000 * config.seed + number
        rows = add_passed_over(train_rows, train_rows, per_like=_PASSED_OVER_PER_LIKE, seed=seed)
        movies = movie_rows(rows, items, train=train_rows)
        return movie_examples(movies, candidates_per_example=48, seed=seed)

    held_out = add_passed_over(valid_rows, ratings, per_like=_PASSED_OVER_PER_LIKE, seed=0)
    return TrainingData(
        epoch=epoch,
        valid=list(
            movie_examples(movie_rows(held_out, items, train=train_rows), candidates_per_example=48)
        ),
        split={"train": train_rows, "valid": held_out, "items": items},
        fingerprint={
            name: fingerprint(folder / name) for name in ("ratings.parquet", "items.parquet")
        },
    )


def _load_examples(path: Path, config: TrainConfig) -> TrainingData:
    rows = read_examples(path)
    return TrainingData(epoch=lambda _: rows, valid=[], fingerprint={path.name: fingerprint(path)})


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _tokenizer_for(
    examples: Sequence[TrainingExample], tasks: Sequence[Task]
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on prompts, rendered with one that knows bytes and labels only."""
    by_name = {task.name: task for task in tasks}
    bytewise = train_tokenizer([" "], tasks)
    renderer = Renderer(TextEncoder(bytewise), max_prompt_tokens=2**31)
    texts = []
    for example in examples[:_NUM_TOKENIZER_EXAMPLES]:
        rendered = renderer.render(by_name[example.request.task], example.request)
        texts.append(rendered.prefix.removeprefix(bytewise.bos_token))
        texts += rendered.segments
    return train_tokenizer(texts, tasks)
