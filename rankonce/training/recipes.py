"""Recipes: functions that say what is trained, on what and how, each with its defaults."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from rankonce.datasets.ml_small import (
    add_passed_over,
    files_of,
    read_ml_small,
    split_each_member,
)
from rankonce.datasets.movielens import movie_examples, movie_rows, read_films
from rankonce.errors import DataError, TrainingError
from rankonce.prompts.tasks import Task
from rankonce.records import TrainingExample
from rankonce.training.adapters import AdapterConfig
from rankonce.training.catalogue import catalogue_source, make_catalogue
from rankonce.training.loop import TrainConfig
from rankonce.training.ml1m import load_catalogue, load_ml1m
from rankonce.training.multitask import load_film_texts, load_multitask, load_questions
from rankonce.training.runs import Evaluate, run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, fingerprint_files, label_source
from rankonce.training.teacher import hide_members

# Members of an epoch of whom nothing is said but the history.
_NEWCOMERS = 0.2
# Of every member's rows, the newest.
HELD_OUT_SHARE = 0.1
_PASSED_OVER_PER_LIKE = 1
_CANDIDATES = 48


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
        named: dict[str, list[str]] = {stage.name: [] for stage in self.stages}
        for setting in settings:
            stage, _, rest = setting.partition(".")
            if stage not in named or rest.startswith("=") or "=" not in rest:
                raise TrainingError(
                    f"set: should be STAGE.NAME=VALUE with a stage of {', '.join(named)}, "
                    f"is {setting!r}"
                )
            named[stage].append(rest)
        stages = (
            replace(one, config=replace(one.config, **read_settings(named[one.name])))
            for one in self.stages
        )
        return replace(self, stages=tuple(stages))


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read settings of training, each given as ``NAME=VALUE``.

    Raises:
        TrainingError: names the one that there is none of, or the value it does not take.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, is_given, text = setting.partition("=")
        if not is_given:
            raise TrainingError(f"set: should be NAME=VALUE, is {setting!r}")
        if name in changes:
            raise TrainingError(f"set: should name {name} once")
        changes[name] = _read_setting(name, text)
    return changes


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
    """MovieLens-1M in CoLLM's split: ``train.parquet``, ``valid.parquet``, ``items.parquet``.

    With ratings of another catalogue beside it (``../ml-small``) the ranker first learns by heart
    how films were liked there.
    """
    return Recipe(
        name="ml1m",
        description="will the member like the film; MovieLens-1M, CoLLM's split by time",
        stages=(
            Stage(
                name="catalogue",
                load=load_catalogue,
                config=TrainConfig(
                    epochs=2, targets_per_step=128, learning_rate=2e-3, averaging=0.98
                ),
            ),
            Stage(
                name="finetune",
                load=load_ml1m,
                config=TrainConfig(
                    epochs=3, targets_per_step=64, learning_rate=2e-3, averaging=0.99
                ),
            ),
        ),
        size="1m",
    ).with_seed(1)


def ml1m_alone() -> Recipe:
    """The recipe ``ml1m`` without the other catalogue, to see what that is worth."""
    whole = ml1m()
    finetune = replace(whole.stages[-1], load=partial(load_ml1m, with_catalogue=False))
    return replace(
        whole,
        name="ml1m-alone",
        description="the same without what another catalogue knows of the films",
        stages=(finetune,),
    )


def ml_small() -> Recipe:
    """MovieLens latest-small with films passed over; the embedded ranker begins with it."""
    return Recipe(
        name="ml-small",
        description="which films does the member pick and like; MovieLens latest-small",
        stages=(
            Stage(
                name="catalogue",
                load=_load_own_catalogue,
                config=TrainConfig(
                    epochs=1, targets_per_step=128, learning_rate=2e-3, averaging=0.98
                ),
            ),
            Stage(
                name="finetune",
                load=_load_ml_small,
                config=TrainConfig(
                    epochs=1,
                    targets_per_step=128,
                    learning_rate=1.5e-3,
                    dropout=0.05,
                    averaging=0.99,
                ),
            ),
        ),
        size="1m",
    ).with_seed(1)


def multitask() -> Recipe:
    """One ranker for over thirty tasks: films of MovieLens latest-small, four simulated platforms.

    First it reads films and histories as texts, then it answers questions about requests of all
    domains, then it learns to rank them together.
    """
    return Recipe(
        name="multitask",
        description="over thirty tasks of five domains; MovieLens latest-small and simulators",
        stages=(
            Stage(
                name="pretrain",
                load=load_film_texts,
                config=TrainConfig(
                    epochs=1, targets_per_step=8192, learning_rate=1.5e-3, averaging=0.98
                ),
            ),
            Stage(
                name="instruct",
                load=load_questions,
                config=TrainConfig(
                    epochs=1, targets_per_step=512, learning_rate=1.5e-3, averaging=0.98
                ),
            ),
            Stage(
                name="finetune",
                load=load_multitask,
                config=TrainConfig(
                    epochs=3, targets_per_step=64, learning_rate=1.5e-3, averaging=0.99
                ),
            ),
        ),
        size="0.4m",
    ).with_seed(1)


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    "ml1m": ml1m,
    "ml1m-alone": ml1m_alone,
    "ml-small": ml_small,
    "multitask": multitask,
}


def find_recipe(name: str) -> Recipe:
    """Build the recipe of this name.

    Raises:
        TrainingError: there is none.
    """
    if name not in RECIPES:
        raise TrainingError(f"recipe: should be one of {', '.join(RECIPES)}, is {name!r}")
    return RECIPES[name]()


def run_recipe(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    model: str | None = None,
    tasks: Iterable[Task] = (),
    evaluate: Evaluate | None = None,
    adapter: AdapterConfig | None = None,
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
        adapter=adapter,
    )


def _load_own_catalogue(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    ratings, items = read_ml_small(folder)
    train_rows, _ = _split_ratings(folder, ratings)
    return catalogue_source(make_catalogue(train_rows, read_films(items)), folder, config, tasks)


def _load_ml_small(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    ratings, items = read_ml_small(folder)
    train_rows, valid_rows = _split_ratings(folder, ratings)

    def epoch(number: int) -> Iterable[TrainingExample]:
        seed = 1000 * config.seed + number
        rows = add_passed_over(train_rows, train_rows, per_like=_PASSED_OVER_PER_LIKE, seed=seed)
        rows = hide_members(rows, share=_NEWCOMERS, seed=seed)
        movies = movie_rows(rows, items, train=train_rows)
        return movie_examples(movies, candidates_per_example=_CANDIDATES, seed=seed)

    held_out = add_passed_over(valid_rows, ratings, per_like=_PASSED_OVER_PER_LIKE, seed=0)
    return label_source(
        epoch,
        tasks=tasks,
        valid=list(
            movie_examples(
                movie_rows(held_out, items, train=train_rows), candidates_per_example=_CANDIDATES
            )
        ),
        split={"train": train_rows, "valid": held_out, "items": items},
        settings={
            "held_out_share": HELD_OUT_SHARE,
            "candidates_per_example": _CANDIDATES,
            "passed_over_per_like": _PASSED_OVER_PER_LIKE,
            "newcomers": _NEWCOMERS,
        },
        fingerprint=fingerprint_files(files_of(folder)),
    )


def _split_ratings(folder: Path, ratings: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    train_rows, valid_rows = split_each_member(ratings, held_out_share=HELD_OUT_SHARE)
    if train_rows.is_empty():
        raise DataError(
            f"{folder}: should hold a member with two ratings of 4 stars and more or 3 and less; "
            f"of every member the newest {HELD_OUT_SHARE:.0%} are held out"
        )
    return train_rows, valid_rows
