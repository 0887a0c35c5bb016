"""MovieLens-1M in the split of CoLLM, by months of the calendar (UTC).

    train   June 2001 to March 2002        33,891 rows
    valid   April to August 2002           10,401 rows
    test    September 2002 to January 2003  7,331 rows

A rating of 4 and more is a like. The history of a row is what its member liked before it in these
twenty months, oldest first: what stands before it in the same second of the source is in it too,
since members rate whole pages at once. Members and films keep MovieLens' numbers.

Source: Zhang et al. 2023, "CoLLM: Integrating Collaborative Embeddings into Large Language Models
for Recommendation"; the months are those of the notebook that its authors publish. They number
members and films anew, and the order in which they read the ratings of one second is that of a
join; here it is the order of ``ratings.dat``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from rankonce.datasets.common_form import MANIFEST, open_dataset
from rankonce.datasets.ml_small import LIKE, films_of, read_numbered_ratings
from rankonce.datasets.movielens import read_rows
from rankonce.errors import DataError

_NAME = "ml-1m"
_FILES = ("train.parquet", "valid.parquet", "items.parquet")
# The first month of each part, and the one after the last.
_MONTHS = ((2001, 6), (2002, 4), (2002, 9), (2003, 2))
_STARTS = tuple(int(datetime(*month, 1, tzinfo=UTC).timestamp()) for month in _MONTHS)


@dataclass(frozen=True, kw_only=True)
class CollmSplit:
    """The parts, each with user_id, item_id, label (1 = liked), timestamp (s), history_ids.

    Attributes:
        items: item_id, title, genres of the films in any part.
        test: the newest part, where the folder holds all of MovieLens-1M.
        files: what was read.
    """

    train: pl.DataFrame
    valid: pl.DataFrame
    items: pl.DataFrame
    test: pl.DataFrame | None
    files: tuple[Path, ...]

    def tables(self) -> Mapping[str, pl.DataFrame]:
        """Name the parts that were cut here, as files of a run; none where they were files."""
        if self.test is None:
            return {}
        return {"train": self.train, "valid": self.valid, "test": self.test, "items": self.items}


def read_collm_split(folder: Path) -> CollmSplit:
    """Read the parts: three Parquet files, or what ``rankonce datasets ml-1m`` made.

    Raises:
        DataError: the folder holds neither, or a part of the split has no rows.
    """
    if (folder / MANIFEST).exists():
        return _cut(folder)
    paths = tuple(folder / name for name in _FILES)
    if missing := [path.name for path in paths if not path.exists()]:
        raise DataError(
            f"{folder}: should hold {', '.join(_FILES)}, has no {', '.join(missing)}; or be made "
            f"by rankonce datasets {_NAME} --out DIR"
        )
    train, valid, items = (read_rows(path) for path in paths)
    return CollmSplit(train=train, valid=valid, items=items, test=None, files=paths)


def _cut(folder: Path) -> CollmSplit:
    dataset = open_dataset(folder)
    if dataset.name != _NAME:
        raise DataError(f"{folder}: should hold {_NAME}, holds {dataset.name}")
    ratings = read_numbered_ratings(dataset).sort("user_id", "timestamp", maintain_order=True)
    moment = pl.col("timestamp")
    asked = ratings.filter((moment >= _STARTS[0]) & (moment < _STARTS[-1])).select(
        "user_id", "item_id", "timestamp", label=(pl.col("rating") >= LIKE).cast(pl.Int8)
    )
    rows = _add_histories(asked).sort("timestamp", maintain_order=True)
    parts = [rows.filter((moment >= start) & (moment < end)) for start, end in pairwise(_STARTS)]
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        if part.is_empty():
            raise DataError(
                f"{folder}: should hold all of {_NAME}, has no ratings of the {name} part"
            )
    train, valid, test = parts
    items = films_of(dataset).join(rows, on="item_id", how="semi")
    files = (dataset.tables["events"], dataset.tables["items"])
    return CollmSplit(train=train, valid=valid, test=test, items=items, files=files)


def _add_histories(rows: pl.DataFrame) -> pl.DataFrame:
    """Add to rows, those of a member together and in order, what the member liked before each."""
    liked = pl.col("label").cast(pl.Int64)
    before = liked.cum_sum() - liked
    # A member's likes stand together, so that each history is one stretch of all likes.
    counts = rows.select(
        of_all=before, of_member=before.over("user_id", order_by=pl.int_range(pl.len()))
    )
    ends, lengths = counts["of_all"].to_numpy(), counts["of_member"].to_numpy()
    films = rows.filter(pl.col("label") == 1)["item_id"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(ends - offsets[1:], lengths) + np.arange(offsets[-1])
    histories = pa.LargeListArray.from_arrays(offsets, films[places])
    return rows.with_columns(history_ids=pl.Series(values=histories))
