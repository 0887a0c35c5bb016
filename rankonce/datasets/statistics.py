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

from rankonce.errors import DataError
from rankonce.prompts.features import (
    Ints,
    PastEvents,
    Questions,
    genre_rates,
    item_rates,
    member_rates,
    overall_share,
)

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
    past, asked = read_past(train), read_questions(rows)
    item, member = item_rates(past, asked), member_rates(past, asked)
    columns = {
        "item_count": item.counts.astype(np.int64),
        "item_likes": item.likes.astype(np.int64),
        "user_count": member.counts.astype(np.int64),
        "user_likes": member.likes.astype(np.int64),
        "global_share": overall_share(past, asked),
        "user_genre_count": None,
        "user_genre_likes": None,
    }
    if genres_by_item is not None:
        genre = genre_rates(past, asked, genres_by_item=genres_by_item)
        columns |= {"user_genre_count": genre.counts, "user_genre_likes": genre.likes}
    return pl.DataFrame(
        columns,
        schema_overrides={"user_genre_count": pl.Float64, "user_genre_likes": pl.Float64},
        nan_to_null=True,
    )


def read_past(rows: pl.DataFrame) -> PastEvents:
    """Take rows with labels as known events, with their histories where there are any.

    Raises:
        DataError: a column is missing or holds something else.
    """
    members, items, moments = (read_whole_numbers(rows, name) for name in _KEYS)
    return PastEvents(
        members=members,
        items=items,
        moments=moments,
        likes=read_labels(rows),
        histories=_read_histories(rows),
    )


def read_questions(rows: pl.DataFrame) -> Questions:
    """Take rows as questions; a label is not read.

    Raises:
        DataError: a column is missing or holds something else.
    """
    members, items, moments = (read_whole_numbers(rows, name) for name in _KEYS)
    return Questions(members=members, items=items, moments=moments, histories=_read_histories(rows))


def _read_histories(rows: pl.DataFrame) -> list[list[int]] | None:
    if "history_ids" not in rows.columns:
        return None
    histories = rows["history_ids"]
    inner = getattr(histories.dtype, "inner", None)
    if inner is None or not (inner.is_integer() or inner == pl.Null) or histories.null_count():
        raise DataError(f"history_ids: should be lists of whole numbers, are {histories.dtype}")
    lists: list[list[int]] = histories.to_list()
    if histories.list.drop_nulls().list.len().sum() < histories.list.len().sum():
        raise DataError("history_ids: should hold whole numbers without nulls")
    return lists


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
