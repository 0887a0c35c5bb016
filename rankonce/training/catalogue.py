"""What another catalogue's ratings say of films, taught by the films' names.

A ranker that reads titles can know of a film what no table of ids can carry over: how members of
another platform liked it. Its requests are the same task's, with nothing but title and genres of a
film and nothing of a member; the labels are soft, the film's share of likes there.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.datasets.ml_small import (
    files_of,
    film_like_shares,
    leave_out_members,
    read_ratings,
)
from rankonce.datasets.movielens import TASK, read_films
from rankonce.errors import DataError
from rankonce.records import Item, ScoreRequest, TrainingExample, Value
from rankonce.training.loop import TrainConfig
from rankonce.training.stages import StageSource, Tasks, fingerprint_files, label_source

# How often an epoch asks of every film, and of how many at once.
_TIMES, _CANDIDATES = 10, 24
# Stars above which a rating counts as a like, as in CoLLM's split of MovieLens-1M.
_LIKED_ABOVE = 3.0
# The same genre has another name there.
_GENRES = {"Children": "Children's"}


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Films of another platform.

    Attributes:
        films: title and genres, by id.
        like_shares, num_raters: by id.
    """

    films: Mapping[int, Mapping[str, Value]]
    like_shares: Mapping[int, float]
    num_raters: Mapping[int, int]

    def find(self, films: Mapping[int, Mapping[str, Value]]) -> dict[int, tuple[float, float]]:
        """Find films with the same titles: like share and number of raters, by the films' ids."""
        by_title = {str(self.films[film]["title"]): film for film in self.like_shares}
        found = {}
        for film, fields in films.items():
            other = by_title.get(str(fields["title"]))
            if other is not None:
                found[film] = (self.like_shares[other], float(self.num_raters[other]))
        return found


def read_catalogue(folder: Path, *, since: int, until: int, mean: float) -> Catalogue:
    """Read a folder of ratings and items; above 3 stars a rating is a like.

    Args:
        since, until: members who rated anything in this time are left out whole, since they may be
            members of the platform that the ranker is for.
        mean: share of likes on that platform, from which films deviate.

    Raises:
        DataError: a file or a column is missing.
    """
    ratings, items = read_ratings(folder)
    others = leave_out_members(ratings, since=since, until=until)
    rows = others.with_columns(label=(pl.col("rating") > _LIKED_ABOVE).cast(pl.Int8))
    films = {}
    for film, fields in read_films(items).items():
        genres = fields.get("genres")
        films[film] = {**fields, "title": str(fields["title"]).strip()}
        if isinstance(genres, list):
            films[film]["genres"] = [_GENRES.get(name, name) for name in genres]
    return make_catalogue(rows, films, mean=mean)


def make_catalogue(
    rows: pl.DataFrame, films: Mapping[int, Mapping[str, Value]], *, mean: float | None = None
) -> Catalogue:
    """Estimate how the films of rows are liked.

    Args:
        rows: user_id, item_id, label (1 = liked).
        films: title and genres by id.
        mean: see ``film_like_shares``.
    """
    known = film_like_shares(rows, mean=mean).filter(pl.col("item_id").is_in(list(films)))
    ids = known["item_id"].to_list()
    return Catalogue(
        films=films,
        like_shares=dict(zip(ids, known["like_share"].to_list(), strict=True)),
        num_raters=dict(zip(ids, known["num_raters"].to_list(), strict=True)),
    )


def quality_examples(
    catalogue: Catalogue, *, candidates_per_example: int, seed: int
) -> Iterator[TrainingExample]:
    """Ask of every film once whether a member of whom nothing is known will like it."""
    films = np.random.default_rng(seed).permutation(list(catalogue.like_shares)).tolist()
    for start in range(0, len(films), candidates_per_example):
        some = films[start : start + candidates_per_example]
        yield TrainingExample(
            request=ScoreRequest(
                task=TASK,
                profile={"num_ratings": 0},
                candidates=tuple(Item(id=str(film), fields=catalogue.films[film]) for film in some),
            ),
            labels=tuple(_label(catalogue.like_shares[film]) for film in some),
        )


def _label(share: float) -> dict[str, float]:
    return {"Yes": share, "No": 1 - share}


def repeated_quality_examples(
    catalogue: Catalogue, *, candidates_per_example: int, seed: int, times: int
) -> Iterable[TrainingExample]:
    """Ask of every film several times, in another order each."""
    for number in range(times):
        yield from quality_examples(
            catalogue, candidates_per_example=candidates_per_example, seed=1000 * seed + number
        )


def catalogue_source(
    catalogue: Catalogue, folder: Path, config: TrainConfig, tasks: Tasks
) -> StageSource:
    """Make the source of a stage that learns the catalogue by heart.

    Args:
        folder: its files, for the fingerprint.

    Raises:
        DataError: no film has ratings of two members.
    """
    if not catalogue.like_shares:
        raise DataError(f"{folder}: should hold a film that two members rated")

    def epoch(number: int) -> Iterable[TrainingExample]:
        return repeated_quality_examples(
            catalogue,
            candidates_per_example=_CANDIDATES,
            seed=100 * config.seed + number,
            times=_TIMES,
        )

    digests = fingerprint_files(files_of(folder))
    return label_source(
        epoch,
        tasks=tasks,
        fingerprint={f"{folder.name}/{name}": digest for name, digest in digests.items()},
        settings={"times": _TIMES, "candidates_per_example": _CANDIDATES},
    )
