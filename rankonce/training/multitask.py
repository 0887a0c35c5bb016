"""One ranker for the tasks of all domains: what the recipe ``multitask`` reads.

The films' requests come from MovieLens latest-small, all others from the simulated platforms.
No request from later than the cut is learnt: of the films the newest 15 % of the ratings are held
out, on the simulated platforms their valid and test parts.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankonce.datasets.domains import SIMULATED, TASK_SOURCES
from rankonce.datasets.domains.films import film_examples
from rankonce.datasets.domains.platform import Domain, build_platform
from rankonce.datasets.ml_small import files_of, read_ratings
from rankonce.records import TrainingExample
from rankonce.training.data import mix_tasks
from rankonce.training.instructions import record_source
from rankonce.training.loop import TrainConfig
from rankonce.training.pretraining import PretrainingData, pretrain_source
from rankonce.training.stages import StageSource, Tasks, fingerprint_files, label_source

# One of every domain, each with another surface: a ranker is measured on them without having seen
# them.
UNSEEN_TASKS = ("job-opening", "movie-premiere", "post-newcomer", "product-launch", "song-similar")
# Requests of a task, so that none crowds out the others.
_NUM_REQUESTS = 1000
# Requests of a task that questions are asked about.
_NUM_RECORDS = 300
# Drawn over a platform's whole time, of which 70 % is its train part.
_NUM_SIMULATED = 1430
_EARLIER_SHARE = 0.85
_NUM_VALID = 20


def film_cut(folder: Path) -> float:
    """The moment (Unix seconds) from which on ratings of films are held out."""
    ratings, _ = read_ratings(folder)
    return float(ratings["timestamp"].quantile(_EARLIER_SHARE, "nearest") or 0.0)


def load_film_texts(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    """Read films and histories in words, from before the cut."""
    return pretrain_source(PretrainingData(weights={folder: 1.0}, until=film_cut(folder)), config)


def load_questions(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    """Ask about some of the requests that ``load_multitask`` reads."""
    requests = _read_requests(folder, config.seed)
    some = [one for early, _ in requests.values() for one in _spread(early, _NUM_RECORDS)]
    records = list(mix_tasks(some, temperature=1, seed=config.seed))
    return record_source(records, config, tasks, fingerprint=_fingerprint(folder, records))


def load_multitask(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
    """Read the requests of all tasks but those of ``UNSEEN_TASKS``, each in a wording at random."""
    requests = _read_requests(folder, config.seed)
    rows = [one for early, _ in requests.values() for one in early]
    valid = [one for _, late in requests.values() for one in late]

    def epoch(number: int) -> Iterable[TrainingExample]:
        return mix_tasks(rows, temperature=1, seed=config.seed + number)

    return label_source(
        epoch,
        tasks=tasks,
        valid=valid,
        fingerprint=_fingerprint(folder, rows),
        settings={"unseen_tasks": list(UNSEEN_TASKS), "requests_a_task": _NUM_REQUESTS},
        style_seed=config.seed,
    )


def _read_requests(
    folder: Path, seed: int
) -> dict[str, tuple[list[TrainingExample], list[TrainingExample]]]:
    """Read of every task what was asked before the cut, and some of what was asked later."""
    cut = film_cut(folder)
    platforms = {domain.name: build_platform(domain) for domain in SIMULATED}
    found = {}
    for task, source in TASK_SOURCES.items():
        if task in UNSEEN_TASKS:
            continue
        if isinstance(source, Domain):
            made = list(platforms[source.name].examples(task, _NUM_SIMULATED))
            early = [one.example for one in made if one.split == "train"]
            late = [one.example for one in made if one.split == "valid"]
        else:
            films = list(film_examples(task, folder, seed=seed))
            early = [one for one in films if _time(one) < cut]
            late = [one for one in films if _time(one) >= cut]
        found[task] = (_spread(early, _NUM_REQUESTS), _spread(late, _NUM_VALID))
    return found


def _fingerprint(folder: Path, requests: Sequence[TrainingExample]) -> dict[str, Any]:
    return {
        **fingerprint_files(files_of(folder, with_tags=True)),
        "requests": hashlib.sha256(repr(requests).encode()).hexdigest(),
        "until": film_cut(folder),
    }


def _spread(examples: Sequence[TrainingExample], count: int) -> list[TrainingExample]:
    """Take up to so many, spread evenly."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)
    return [examples[place] for place in places.tolist()]


def _time(example: TrainingExample) -> float:
    return float(example.request.time or 0.0)
