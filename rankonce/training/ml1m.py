"""Stages of the recipe ``ml1m``: another catalogue by heart, then what a teacher and members say.

python -m rankonce.training.ml1m FOLDER     how good the teacher is, as JSON
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.datasets.collm_split import read_collm_split
from rankonce.datasets.movielens import movie_examples, movie_rows
from rankonce.datasets.statistics import read_labels, read_whole_numbers
from rankonce.environment import describe_environment
from rankonce.errors import RankOnceError
from rankonce.records import TrainingExample
from rankonce.training.catalogue import (
    Catalogue,
    catalogue_source,
    read_catalogue,
    repeated_quality_examples,
)
from rankonce.training.loop import TrainConfig
from rankonce.training.stages import StageSource, Tasks, fingerprint_files, label_source
from rankonce.training.teacher import add_unrated, fit_teacher, hide_members

# Of the train rows, the first ones that are no examples.
_FIRST_SHARE = 0.3
# How often an epoch of fine-tuning asks of every film of the catalogue.
_REMINDERS = 2
# Members of an epoch of whom nothing is said but the history: a third of the rows that are served
# later are of members who have no rating among the train rows.
_NEWCOMERS = 0.2
# Films that a member has not rated, for each that the member has.
_UNRATED_PER_ROW = 2
_CANDIDATES = 24
# When MovieLens-1M was rated; its members may be in other sets of MovieLens too.
_ML1M_SINCE, _ML1M_UNTIL = 954_547_200, 1_049_155_200


def _find_catalogue(folder: Path) -> Path | None:
    """Another catalogue lies in the folder or beside it."""
    folder = folder.resolve()
    for place in (folder / "ml-small", folder.parent / "ml-small"):
        if place.is_dir() and place.resolve() != folder.resolve():
            return place
    return None


def _read_other_catalogue(folder: Path, train_rows: pl.DataFrame) -> Catalogue | None:
    other = _find_catalogue(folder)
    if other is None:
        return None
    return read_catalogue(
        other,
        since=_ML1M_SINCE,
        until=_ML1M_UNTIL,
        mean=float(np.mean(read_labels(train_rows))),
    )


def load_catalogue(folder: Path, config: TrainConfig, tasks: Tasks) -> StageSource | None:
    """Ask of the films of ``FOLDER/ml-small`` or ``FOLDER/../ml-small``; None without one."""
    catalogue = _read_other_catalogue(folder, read_collm_split(folder).train)
    other = _find_catalogue(folder)
    if catalogue is None or other is None:
        return None
    return catalogue_source(catalogue, other, config, tasks)


def load_ml1m(
    folder: Path, config: TrainConfig, tasks: Tasks, *, with_catalogue: bool = True
) -> StageSource:
    """Ask of the later train rows and of films that nobody rated, with a teacher's labels."""
    parts = read_collm_split(folder)
    train_rows, items = parts.train, parts.items
    catalogue = _read_other_catalogue(folder, train_rows) if with_catalogue else None
    start = _first_moment(train_rows)
    teach = fit_teacher(train_rows, items, since=start, catalogue=catalogue)
    examples = train_rows.filter(pl.col("timestamp") >= start)

    def epoch(number: int) -> Iterable[TrainingExample]:
        seed = 1000 * config.seed + number
        drawn = add_unrated(examples, per_row=_UNRATED_PER_ROW, seed=seed)
        rows = hide_members(drawn, share=_NEWCOMERS, seed=seed)
        yield from movie_examples(
            movie_rows(rows, items, train=train_rows, taught=teach(rows)),
            candidates_per_example=_CANDIDATES,
            seed=seed,
        )
        if catalogue is not None:
            # What was learnt by heart is forgotten if it is not asked again.
            yield from repeated_quality_examples(
                catalogue,
                candidates_per_example=_CANDIDATES,
                seed=seed,
                times=_REMINDERS,
            )

    held_out = movie_rows(parts.valid, items, train=train_rows)
    return label_source(
        epoch,
        tasks=tasks,
        valid=list(movie_examples(held_out, candidates_per_example=_CANDIDATES)),
        split=parts.tables(),
        fingerprint=fingerprint_files(parts.files),
        settings={
            "first_share_left_out": _FIRST_SHARE,
            "candidates_per_example": _CANDIDATES,
            "unrated_per_row": _UNRATED_PER_ROW,
            "newcomers": _NEWCOMERS,
            "catalogue_reminders": 0 if catalogue is None else _REMINDERS,
        },
    )


def _first_moment(train_rows: pl.DataFrame) -> float:
    # The first rows know next to nothing of what was before them, as no row does that is served.
    return float(np.quantile(read_whole_numbers(train_rows, "timestamp"), _FIRST_SHARE))


def measure_teacher(folder: Path) -> dict[str, dict[str, float]]:
    """Measure the teacher on the valid part, with the other catalogue and without.

    Raises:
        DataError: a file or a column is missing.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    parts = read_collm_split(folder)
    train_rows, valid_rows, items = parts.train, parts.valid, parts.items
    catalogue = _read_other_catalogue(folder, train_rows)
    labels = read_labels(valid_rows)

    def measure(known: Catalogue | None) -> dict[str, float]:
        teach = fit_teacher(train_rows, items, since=_first_moment(train_rows), catalogue=known)
        shares = teach(valid_rows)
        return {
            "auc": float(roc_auc_score(labels, shares)),
            "log_loss": float(log_loss(labels, shares)),
        }

    measured = {"without another catalogue": measure(None)}
    if catalogue is not None:
        measured["with another catalogue"] = measure(catalogue)
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        measured = measure_teacher(parser.parse_args().folder)
    except RankOnceError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({**measured, "environment": describe_environment()}, indent=2))
