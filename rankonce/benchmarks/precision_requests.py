"""Requests of a comparison from MovieLens."""

from pathlib import Path

import numpy as np

from rankonce.errors import DataError
from rankonce.evaluation.labelled_requests import LabelledRequest, preparation
from rankonce.model.loading import LoadedModel

# Members whose held-out rows are fewer have next to nothing to rank.
_MIN_CANDIDATES, _MAX_CANDIDATES = 10, 50


def read_ml_small(
    folder: Path, model: LoadedModel, *, num_members: int
) -> tuple[list[LabelledRequest], dict[str, str]]:
    """Make one request a member of the held-out rows, all seen from the first one's moment.

    Args:
        num_members: at most; the same ones are drawn every time.

    Returns:
        The requests and the fingerprint of the data.

    Raises:
        RankOnceError: the folder or the number cannot be used.
    """
    import polars as pl

    from rankonce.datasets.movielens import movie_examples, movie_rows
    from rankonce.prompts.tasks import library_tasks
    from rankonce.training.recipes import ml_small

    if num_members < 1:
        raise DataError(f"members: should be 1 or more, is {num_members}")
    stage = ml_small().stages[-1]
    data = stage.load(folder, stage.config, library_tasks())
    assert data is not None
    valid = data.split["valid"]
    counts = valid.group_by("user_id").len().filter(pl.col("len") >= _MIN_CANDIDATES)
    members = np.sort(counts["user_id"].to_numpy())
    drawn = np.random.default_rng(0).permutation(members)[:num_members].tolist()
    place = pl.int_range(pl.len()).over("user_id")
    rows = valid.filter(pl.col("user_id").is_in(drawn) & (place < _MAX_CANDIDATES))
    movies = movie_rows(rows, data.split["items"], train=data.split["train"])
    examples = movie_examples(movies, candidates_per_example=_MAX_CANDIDATES)
    prepare = preparation(model)
    return [prepare(one.request, one.labels) for one in examples], dict(data.fingerprint)
