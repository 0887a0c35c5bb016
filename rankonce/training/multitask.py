"""One ranker for the tasks of all domains: what the recipe ``multitask`` reads.

The films' requests come from MovieLens latest-small, all others from the simulated platforms.
No request from later than the cut is learnt: of the films the newest 15 % of the ratings are held
out, on the simulated platforms their valid and test parts.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rankonce.datasets.domains import SIMULATED, TASK_SOURCES
from rankonce.datasets.domains.films import film_examples
from rankonce.datasets.domains.platform import Domain, build_platform
from rankonce.datasets.ml_small import read_ratings
from rankonce.records import TrainingExample
from rankonce.training.data import mix_tasks
from rankonce.training.loop import TrainConfig
from rankonce.training.pretraining import PretrainingData, pretrain_source
from rankonce.training.stages import StageSource, Tasks, fingerprint_files, label_source

# One of every domain, each with another surface: a ranker is measured on them without having seen
# them.
UNSEEN_TASKS = ("job-opening", "movie-premiere", "post-newcomer", "product-launch", "song-similar")
# Requests of a task, so that none crowds out the others.
_NUM_REQUESTS = 1000
# Drawn over a platform's whole time, of which 70 % is its train part.
_NUM_SIMULATED = 1430
_EARLIER_SHARE = 0.85
_NUM_VALID = 20
_FILES = ("ratings.parquet", "items.parquet", "tags.parquet")


def film_cut(folder: Path) -> float:
    """The moment (Unix seconds) from which on ratings of films are held out."""
    ratings, _ = read_ratings(folder)
    return float(ratings["timestamp"].quantile(_EARLIER_SHARE, "nearest") or 0.0)


def load_film_texts(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    """Read films and histories in words, from before the cut."""
    return pretrain_source(PretrainingData(weights={folder: 1.0}, until=film_cut(folder)), config)


def load_multitask(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    """Read the requests of all tasks but those of ``UNSEEN_TASKS``."""
    files = fingerprint_files(folder / name for name in _FILES)
    cut = film_cut(folder)
    platforms = {domain.name: build_platform(domain) for domain in SIMULATED}
    rows: list[TrainingExample] = []
    valid: list[TrainingExample] = []
    for task, source in TASK_SOURCES.items():
        if task in UNSEEN_TASKS:
            continue
        if isinstance(source, Domain):
            made = list(platforms[source.name].examples(task, _NUM_SIMULATED))
            early = [one.example for one in made if one.split == "train"]
            late = [one.example for one in made if one.split == "valid"]
        else:
            films = list(film_examples(task, folder, seed=config.seed))
            early = [one for one in films if _time(one) < cut]
            late = [one for one in films if _time(one) >= cut]
        rows += _spread(early, _NUM_REQUESTS)
        valid += _spread(late, _NUM_VALID)

    def epoch(number: int) -> Iterable[TrainingExample]:
        return mix_tasks(rows, temperature=1, seed=config.seed + number)

    return label_source(
        epoch,
        tasks=tasks,
        valid=valid,
        fingerprint={
            **files,
            "requests": hashlib.sha256(repr(rows).encode()).hexdigest(),
            "until": cut,
        },
    )


def _spread(examples: Sequence[TrainingExample], count: int) -> list[TrainingExample]:
    """Take up to so many, spread evenly."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)
    return [examples[place] for place in places.tolist()]


def _time(example: TrainingExample) -> float:
    return float(example.request.time or 0.0)
