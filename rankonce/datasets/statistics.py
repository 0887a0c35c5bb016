"""Past-only statistics of interaction rows: what was known when a row happened.

A row is one action of a user on an item, liked (1) or not (0). Its statistics count strictly
earlier rows only ("prequential": A. P. Dawid, 1984), so neither its own label nor that of a row
of the same second can reach it. The same counts over the train rows serve rows to be evaluated.

Both functions give these columns, one row for each row of the input, in its order:

    item_count, item_likes              earlier rows of the item, and the liked ones among them
    user_count, user_likes              earlier rows of the user
    global_share                        (likes + 1) / (rows + 2) of all earlier rows
    user_genre_count, user_genre_likes  earlier rows of the user with a genre of the item, mean
                                        over its genres; null where no genre is known
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rankonce.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
GenresByItem = Mapping[int, Sequence[str]]


def past_statistics(
    rows: pl.DataFrame, *, genres_by_item: GenresByItem | None = None
) -> pl.DataFrame:
    """Count for every row what strictly earlier rows say.

    Args:
        rows: columns user_id, item_id (whole numbers), label (0 or 1), timestamp (s); any order.
        genres_by_item: the genres of each item; without it the genre columns are null.

    Raises:
        DataError: a column is missing or holds something else.
    """
    return statistics_from(rows, rows, genres_by_item=genres_by_item)


def statistics_from(
    train: pl.DataFrame, rows: pl.DataFrame, *, genres_by_item: GenresByItem | None = None
) -> pl.DataFrame:
    """Count for every row what the train rows say.

    After a split by time these are all train rows. Where the two parts overlap in time, a row
    still sees the strictly earlier train rows only.

    Args:
        train: columns as in ``past_statistics``.
        rows: columns user_id, item_id, timestamp; a label is not read.

    Raises:
        DataError: a column is missing or holds something else.
    """
    users, items, moments = (read_whole_numbers(train, name) for name in _KEYS)
    likes = read_labels(train)
    row_users, row_items, row_moments = (read_whole_numbers(rows, name) for name in _KEYS)

    item_count, item_likes = count_before(items, moments, likes, row_items, row_moments)
    user_count, user_likes = count_before(users, moments, likes, row_users, row_moments)
    all_count, all_likes = count_before(
        np.zeros_like(items), moments, likes, np.zeros_like(row_items), row_moments
    )
    genre_count: Floats | None = None
    genre_likes: Floats | None = None
    if genres_by_item is not None:
        codes = {name: code for code, name in enumerate(_genre_names(genres_by_item))}
        parents, genres = _explode_genres(items, genres_by_item, codes)
        row_parents, row_genres = _explode_genres(row_items, genres_by_item, codes)
        # Small numbers for the users: any 64-bit id times the genres must not overflow.
        _, user_codes = np.unique(np.concatenate([users, row_users]), return_inverse=True)
        user_codes *= len(codes)
        counts = count_before(
            user_codes[: len(users)][parents] + genres,
            moments[parents],
            likes[parents],
            user_codes[len(users) :][row_parents] + row_genres,
            row_moments[row_parents],
        )
        genre_count, genre_likes = (_mean_by_row(row_parents, c, rows.height) for c in counts)
    return pl.DataFrame(
        {
            "item_count": item_count,
            "item_likes": item_likes,
            "user_count": user_count,
            "user_likes": user_likes,
            "global_share": smoothed_share(all_likes, all_count, prior=0.5, strength=2.0),
            "user_genre_count": genre_count,
            "user_genre_likes": genre_likes,
        },
        schema_overrides={"user_genre_count": pl.Float64, "user_genre_likes": pl.Float64},
        nan_to_null=True,
    )


def smoothed_share(
    likes: Ints | Floats, count: Ints | Floats, *, prior: float | Floats, strength: float
) -> Floats:
    """Shrink a like share towards a prior: (likes + strength * prior) / (count + strength).

    Args:
        likes, count: arrays of one shape, likes ≤ count.
        prior: the share before any row, one number or one a row.
        strength: how many rows the prior is worth; above 0, else an empty count has no share.

    Raises:
        DataError: the strength is not above 0.
    """
    if not strength > 0:
        raise DataError(f"strength: should be above 0, not {strength}")
    prior_likes = strength * np.asarray(prior, dtype=np.float64)
    share: Floats = (likes.astype(np.float64) + prior_likes) / (count.astype(np.float64) + strength)
    return share


def log_odds(share: Floats) -> Floats:
    """Turn shares in (0, 1) into log(share / (1 - share))."""
    odds: Floats = np.log(share) - np.log1p(-share)
    return odds


def count_before(
    keys: Ints, moments: Ints, likes: Ints, query_keys: Ints, query_moments: Ints
) -> tuple[Ints, Ints]:
    """Count for every query the events of its key at strictly earlier moments.

    Args:
        keys, moments, likes: key, time and 0 or 1 of each event, in any order.
        query_keys, query_moments: key and time of each query.

    Returns:
        The events of each query and the sum of their likes.
    """
    if not len(keys) or not len(query_keys):
        return np.zeros_like(query_keys), np.zeros_like(query_keys)
    # One sorted number for (key, rank of the moment) makes every query two binary searches.
    known_keys, key_codes = np.unique(keys, return_inverse=True)
    known_moments, ranks = np.unique(moments, return_inverse=True)
    stride = len(known_moments) + 1
    addresses = key_codes * stride + ranks
    order = np.argsort(addresses, kind="stable")
    addresses = addresses[order]
    likes_until = np.concatenate([[0], np.cumsum(likes[order])])

    query_codes = np.searchsorted(known_keys, query_keys)
    unknown = known_keys[np.minimum(query_codes, len(known_keys) - 1)] != query_keys
    start = np.searchsorted(addresses, query_codes * stride)
    # searchsorted's left side gives the number of known moments strictly before the query.
    until = np.searchsorted(known_moments, query_moments)
    end = np.where(unknown, start, np.searchsorted(addresses, query_codes * stride + until))
    return end - start, likes_until[end] - likes_until[start]


def read_whole_numbers(rows: pl.DataFrame, name: str) -> Ints:
    """Take a column of whole numbers without gaps.

    Raises:
        DataError: it is missing, of another type or has nulls.
    """
    if name not in rows.columns:
        raise DataError(f"{name}: should be a column of the rows, which have {rows.columns}")
    if not rows[name].dtype.is_integer() or rows[name].null_count():
        raise DataError(f"{name}: should be whole numbers without nulls, not {rows[name].dtype}")
    return rows[name].cast(pl.Int64).to_numpy()


def read_labels(rows: pl.DataFrame) -> Ints:
    """Take the label column.

    Raises:
        DataError: it is missing or holds something other than 0 and 1.
    """
    labels = read_whole_numbers(rows, "label")
    if not np.isin(labels, (0, 1)).all():
        raise DataError("label: should be 0 or 1 in every row")
    return labels


_KEYS = ("user_id", "item_id", "timestamp")


def _genre_names(genres_by_item: GenresByItem) -> list[str]:
    return sorted({name for names in genres_by_item.values() for name in names})


def _explode_genres(
    items: Ints, genres_by_item: GenresByItem, codes: Mapping[str, int]
) -> tuple[Ints, Ints]:
    """Give (index of the row, code of the genre) for every genre of every row's item."""
    names = [genres_by_item.get(item, ()) for item in items.tolist()]
    parents = np.repeat(np.arange(len(names)), [len(row) for row in names])
    return parents, np.array([codes[name] for row in names for name in row], dtype=np.int64)


def _mean_by_row(parents: Ints, values: Ints, num_rows: int) -> Floats:
    total = np.bincount(parents, weights=values, minlength=num_rows)
    count = np.bincount(parents, minlength=num_rows)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
