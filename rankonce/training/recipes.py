"""Recipes: functions that say what is trained, on what and how, each with its defaults."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankonce.datasets.ml_small import add_passed_over, read_ml_small, split_each_member
from rankonce.datasets.movielens import movie_examples, movie_rows, read_rows
from rankonce.datasets.statistics import read_whole_numbers
from rankonce.errors import TrainingError
from rankonce.prompts.tasks import Task
from rankonce.records import TrainingExample
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import Evaluate, run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, fingerprint_files, label_source

# Where in the train rows the present of an epoch may lie.
_PRESENT_SHARE = (0.2, 0.8)
# Titles and events that an epoch leaves out: 34,000 labels are learnt by heart otherwise.
_FORGETTING = 0.8
# Part of a label that is what the averages lead one to expect.
_SMOOTHING = 0.7
# Of every member's rows, the newest.
HELD_OUT_SHARE = 0.1
_PASSED_OVER_PER_LIKE = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``rankonce train`` runs.

    Attributes:
        stages: run one after the other, each from the model of the one before.
        size: the size to build where no checkpoint is given.
        seed: of the random weights; the stages have their own.
    """

    name: str
    description: str
    stages: tuple[Stage, ...]
    size: str
    seed: int = 1

    def with_seed(self, seed: int) -> "Recipe":
        """Use a seed everywhere."""
        stages = tuple(replace(s, config=replace(s.config, seed=seed)) for s in self.stages)
        return replace(self, seed=seed, stages=stages)

    def with_settings(self, settings: Sequence[str]) -> "Recipe":
        """Change settings of stages, each given as ``STAGE.NAME=VALUE``.

        Raises:
            TrainingError: names the setting that no stage has, or the value it does not take.
        """
        stages = {stage.name: stage for stage in self.stages}
        for setting in settings:
            path, is_given, text = setting.partition("=")
            stage_name, _, name = path.partition(".")
            if stage_name not in stages or not name or not is_given:
                raise TrainingError(
                    f"set: should be STAGE.NAME=VALUE with a stage of {', '.join(stages)}, "
                    f"is {setting!r}"
                )
            stage = stages[stage_name]
            value = _read_setting(name, text)
            stages[stage_name] = replace(stage, config=replace(stage.config, **{name: value}))
        return replace(self, stages=tuple(stages.values()))


def _read_setting(name: str, text: str) -> Any:
    known = {field.name: field.type for field in fields(TrainConfig)}
    if name not in known:
        raise TrainingError(f"set: a stage has the settings {', '.join(known)}, not {name!r}")
    kind = getattr(known[name], "__name__", str(known[name]))
    try:
        if text == "none" and "None" in kind:
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text]
        if "int" in kind:
            return int(text)
        return float(text) if "float" in kind else text
    except (ValueError, KeyError) as error:
        raise TrainingError(f"set: {name} should be of {kind}, is {text!r}") from error


def ml1m() -> Recipe:
    """MovieLens-1M in CoLLM's split: ``train.parquet``, ``valid.parquet``, ``items.parquet``."""
    return Recipe(
        name="ml1m",
        description="will the member like the film; MovieLens-1M, CoLLM's split by time",
        stages=(
            Stage(
                name="finetune",
                load=_load_ml1m,
                config=TrainConfig(
                    epochs=4,
                    targets_per_step=64,
                    learning_rate=1.5e-3,
                    dropout=0.1,
                    averaging=0.99,
                    seed=1,
                ),
            ),
        ),
        size="1m",
    )


def ml_small() -> Recipe:
    """MovieLens latest-small with films that members passed over; makes the embedded ranker."""
    return Recipe(
        name="ml-small",
        description="which films does the member pick and like; MovieLens latest-small",
        stages=(
            Stage(
                name="finetune",
                load=_load_ml_small,
                config=TrainConfig(
                    epochs=2, targets_per_step=128, learning_rate=1.5e-3, dropout=0.1, seed=1
                ),
            ),
        ),
        size="1m",
    )


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    "ml1m": ml1m,
    "ml-small": ml_small,
}


def run_recipe(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    model: str | None = None,
    tasks: Iterable[Task] = (),
    evaluate: Evaluate | None = None,
) -> None:
    """Run the stages of a recipe; see ``run_stages``."""
    run_stages(
        recipe.stages,
        data,
        out,
        name=recipe.name,
        size=recipe.size,
        seed=recipe.seed,
        model=model,
        tasks=tasks,
        evaluate=evaluate,
    )


def _load_ml1m(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
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
    return label_source(
        epoch,
        tasks=tasks,
        valid=list(movie_examples(held_out, candidates_per_example=24)),
        fingerprint=fingerprint_files(folder / name for name in names),
    )


def _load_ml_small(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    ratings, items = read_ml_small(folder)
    train_rows, valid_rows = split_each_member(ratings, held_out_share=HELD_OUT_SHARE)

    def epoch(number: int) -> Iterable[TrainingExample]:
        seed = 1000 * config.seed + number
        rows = add_passed_over(train_rows, train_rows, per_like=_PASSED_OVER_PER_LIKE, seed=seed)
        movies = movie_rows(rows, items, train=train_rows)
        return movie_examples(movies, candidates_per_example=48, seed=seed)

    held_out = add_passed_over(valid_rows, ratings, per_like=_PASSED_OVER_PER_LIKE, seed=0)
    return label_source(
        epoch,
        tasks=tasks,
        valid=list(
            movie_examples(movie_rows(held_out, items, train=train_rows), candidates_per_example=48)
        ),
        split={"train": train_rows, "valid": held_out, "items": items},
        fingerprint=fingerprint_files(
            folder / name for name in ("ratings.parquet", "items.parquet")
        ),
    )
