"""MovieLens latest-small as rows of likes, with films that a member passed over as negatives.

    ratings   user_id, item_id, rating (0.5-5), timestamp (s)
    items     item_id, title, genres
    tags      user_id, item_id, tag, timestamp

The folder holds these as Parquet files, or is one that ``rankonce datasets ml-latest-small`` made.
A rating of 4 and more is a like, 3 and less a dislike; 3.5 says neither and is left out. What
people rate low they had chosen to watch all the same: to learn taste a ranker must also see films
that the member never watched. These are drawn as often as others had liked them by then, so that
neither popularity nor the year can tell them apart.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from rankonce.datasets.common_form import MANIFEST, Dataset, open_dataset
from rankonce.datasets.movielens import read_rows
from rankonce.datasets.statistics import read_labels, read_whole_numbers
from rankonce.errors import DataError
from rankonce.prompts.features import count_before

# The prompt holds fewer events than this.
_MAX_HISTORY = 60
LIKE, DISLIKE = 4.0, 3.0
# What films' and members' deviations are shrunk by.
_FILM_STRENGTH, _MEMBER_STRENGTH, _ROUNDS = 3.0, 10.0, 6
_COLUMNS = ("user_id", "item_id", "label", "timestamp", "history_ids")


def read_ml_small(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read the ratings as likes and dislikes.

    Returns:
        rows (user_id, item_id, label, timestamp, history_ids; in the order of time) and items.

    Raises:
        DataError: a file or a column is missing.
    """
    ratings, items = read_ratings(folder)
    rows = label_likes(ratings, "rating")
    return add_histories(rows, rows), items


def read_ratings(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read ratings (user_id, item_id, rating, timestamp) and items (item_id, title, genres).

    Raises:
        DataError: a file or a column is missing, or the folder holds another dataset.
    """
    if (dataset := _prepared(folder)) is not None:
        ratings = read_numbered_ratings(dataset)
        return ratings.sort("user_id", "item_id", maintain_order=True), films_of(dataset)
    for name in ("ratings.parquet", "items.parquet"):
        if not (folder / name).exists():
            raise DataError(
                f"{folder}: should hold ratings.parquet and items.parquet, has no {name}; or be "
                "made by rankonce datasets ml-latest-small --out DIR"
            )
    ratings = read_rows(folder / "ratings.parquet")
    if missing := {"user_id", "item_id", "rating", "timestamp"} - set(ratings.columns):
        raise DataError(f"ratings: should have the columns {', '.join(sorted(missing))}")
    return ratings, read_rows(folder / "items.parquet")


def read_numbered_ratings(dataset: Dataset) -> pl.DataFrame:
    """Read a prepared set's ratings of known films: user_id, item_id, rating, timestamp.

    Those of a member stand together in the order of time, and of a second in that of the source.
    """
    events = dataset.read("events").filter(pl.col("value").is_not_null())
    events = events.join(dataset.read("items"), on="item", how="semi", maintain_order="left")
    return _numbered(events.select("member", "item", rating="value", timestamp="time"))


def films_of(dataset: Dataset) -> pl.DataFrame:
    """Read a prepared set's films: item_id, title, genres."""
    films = dataset.read("items").select(
        item_id=pl.col("item").cast(pl.Int64),
        title="title",
        genres=pl.col("categories").list.join("|"),
    )
    return films.collect()


def read_tags(folder: Path) -> pl.DataFrame:
    """Read tags (user_id, item_id, tag, timestamp).

    Raises:
        DataError: there are none, or the folder holds another dataset.
    """
    if (dataset := _prepared(folder)) is not None:
        tags = dataset.read("tags")
        numbered = _numbered(tags.select("member", "item", "tag", timestamp="time"))
        return numbered.sort("user_id", "item_id", maintain_order=True)
    return read_rows(folder / "tags.parquet")


def files_of(folder: Path, *, with_tags: bool = False) -> list[Path]:
    """Name the files that the functions above read."""
    ratings = "ratings.parquet" if _prepared(folder) is None else "events.parquet"
    names = (ratings, "items.parquet", *(("tags.parquet",) if with_tags else ()))
    return [folder / name for name in names]


def _prepared(folder: Path) -> Dataset | None:
    """Open what ``rankonce datasets`` made of a set of MovieLens."""
    if not (folder / MANIFEST).exists():
        return None
    dataset = open_dataset(folder)
    if not dataset.name.startswith("ml-"):
        raise DataError(f"{folder}: should hold a set of MovieLens, holds {dataset.name}")
    return dataset


def _numbered(rows: pl.LazyFrame) -> pl.DataFrame:
    """Give members and items their own numbers."""
    keys = [
        pl.col(name).cast(pl.Int64).alias(key)
        for name, key in (("member", "user_id"), ("item", "item_id"))
    ]
    return rows.select(*keys, pl.exclude("member", "item")).collect()


def label_likes(ratings: pl.DataFrame, stars: str) -> pl.DataFrame:
    """Label likes 1 and dislikes 0, without what lies between, in the order of time."""
    clear = ratings.filter((pl.col(stars) >= LIKE) | (pl.col(stars) <= DISLIKE))
    labelled = clear.with_columns(label=(pl.col(stars) >= LIKE).cast(pl.Int8))
    return labelled.sort("timestamp", "user_id", "item_id")


def leave_out_members(ratings: pl.DataFrame, *, since: int, until: int) -> pl.DataFrame:
    """Leave out all ratings of members who rated anything in a time, in Unix seconds, half-open.

    The sets of MovieLens come from one site: members of one set may be in another, with the very
    same ratings.
    """
    moment = pl.col("timestamp")
    seen = ratings.filter((moment >= since) & (moment < until))["user_id"].unique()
    return ratings.filter(~pl.col("user_id").is_in(seen.implode()))


def film_like_shares(
    rows: pl.DataFrame, *, mean: float | None = None, min_raters: int = 2
) -> pl.DataFrame:
    """Estimate every film's share of likes, free of who rated it.

    Shares are the mean plus the film's deviation beside those of its raters, found in turns
    (``like = mean + member + film``; Koren et al. 2009, section "Adding biases"), each shrunk
    towards 0.

    Args:
        rows: user_id, item_id, label (1 = liked).
        mean: what films deviate from, where the shares are for another platform; that of the rows
            by default.

    Returns:
        item_id, like_share in (0, 1), num_raters; films with ``min_raters`` or more.
    """
    likes = read_labels(rows).astype(np.float64)
    members, member = np.unique(read_whole_numbers(rows, "user_id"), return_inverse=True)
    films, film = np.unique(read_whole_numbers(rows, "item_id"), return_inverse=True)
    own_mean = likes.mean()
    of_member, of_film = np.zeros(len(members)), np.zeros(len(films))
    num_raters = np.bincount(film)
    num_rated = np.bincount(member)
    for _ in range(_ROUNDS):
        rest = np.bincount(film, likes - own_mean - of_member[member])
        of_film = rest / (num_raters + _FILM_STRENGTH)
        rest = np.bincount(member, likes - own_mean - of_film[film])
        of_member = rest / (num_rated + _MEMBER_STRENGTH)
    shares = pl.DataFrame(
        {
            "item_id": films,
            "like_share": np.clip((own_mean if mean is None else mean) + of_film, 0.03, 0.97),
            "num_raters": num_raters,
        }
    )
    return shares.filter(pl.col("num_raters") >= min_raters)


def split_each_member(
    rows: pl.DataFrame, *, held_out_share: float
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Cut every member's rows by time: the last ``held_out_share`` of them are held out."""
    place = pl.int_range(pl.len()).over("user_id")
    is_early = place < (pl.len().over("user_id") * (1 - held_out_share)).floor()
    return rows.filter(is_early), rows.filter(~is_early)


def add_passed_over(
    rows: pl.DataFrame, ratings: pl.DataFrame, *, per_like: int, seed: int
) -> pl.DataFrame:
    """Add ``per_like`` films that the member never rated to every liked row, with label 0.

    Args:
        rows: to which they are added, at the moments of the likes.
        ratings: all rows that are known; says what members rated and how often films are liked.
        seed: of the draw.

    Returns:
        The rows and the added ones in the order of time, with their histories.
    """
    generator = np.random.default_rng(seed)
    likes = ratings.filter(pl.col("label") == 1).sort("timestamp")
    liked_films, liked_moments = likes["item_id"].to_numpy(), likes["timestamp"].to_numpy()
    rated: dict[int, set[int]] = defaultdict(set)
    for user, film in ratings.select("user_id", "item_id").iter_rows():
        rated[user].add(film)
    drawn: list[tuple[int, int, int]] = []
    liked_rows = rows.filter(pl.col("label") == 1).select("user_id", "timestamp")
    for user, moment in liked_rows.iter_rows():
        # A draw from all likes until then takes films in proportion to their likes.
        known = np.searchsorted(liked_moments, moment)
        if not known:
            continue
        films = liked_films[generator.integers(known, size=3 * per_like)].tolist()
        new = list(dict.fromkeys(film for film in films if film not in rated[user]))
        drawn += [(user, film, moment) for film in new[:per_like]]
    columns = zip(*drawn, strict=True) if drawn else ((), (), ())
    users, films_drawn, moments = (list(column) for column in columns)
    passed = pl.DataFrame(
        {
            "user_id": users,
            "item_id": films_drawn,
            "label": [0] * len(drawn),
            "timestamp": moments,
        },
        schema={name: rows.schema[name] for name in _COLUMNS[:-1]},
    )
    both = pl.concat([rows.select(_COLUMNS[:-1]), passed]).sort("timestamp", "user_id", "item_id")
    return add_histories(both, ratings)


def add_histories(rows: pl.DataFrame, ratings: pl.DataFrame) -> pl.DataFrame:
    """Add ``history_ids``: the newest films that the member had liked strictly before each row."""
    likes = ratings.filter(pl.col("label") == 1).sort("user_id", "timestamp", "item_id")
    users, films, moments = (likes[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    asked = rows["user_id"].to_numpy()
    counts, _ = count_before(
        users, moments, np.ones_like(users), asked, rows["timestamp"].to_numpy()
    )
    # A member's likes stand together in the order of time, so that each history is one stretch.
    ends = np.searchsorted(users, asked) + counts
    lengths = np.minimum(counts, _MAX_HISTORY)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(ends - offsets[1:], lengths) + np.arange(offsets[-1])
    histories = pa.LargeListArray.from_arrays(offsets, films[places])
    return rows.select(_COLUMNS[:-1]).with_columns(history_ids=pl.Series(values=histories))
