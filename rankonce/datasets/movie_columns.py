"""Columns for a tabular ranker: what earlier rows, the row's own history and its film say.

Labels reach a row only from strictly earlier known rows. Its history is taken as it is given: it
is part of the request, as it is for every other ranker.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rankonce.datasets.statistics import read_labels, read_whole_numbers, statistics_from
from rankonce.errors import DataError
from rankonce.prompts.features import Floats, Ints, count_before, log_odds, smoothed_share

# Rows that a prior is worth: about where log-loss on the latest train rows is flat.
_ITEM_STRENGTH, _USER_STRENGTH, _PAIR_STRENGTH = 5.0, 10.0, 10.0


@dataclass(frozen=True, kw_only=True)
class _Films:
    """Films by code: every film of the items, rows and histories, numbered from 0.

    Attributes:
        ids: their item_ids, ascending; the place is the code.
        years: from the title's end, "(1999)"; nan where there is none.
        genres: one array of 0 and 1 for each genre's name.
    """

    ids: Ints
    years: Floats
    genres: dict[str, Ints]

    def codes(self, item_ids: Ints) -> Ints:
        """Give the codes of item_ids that are all known."""
        return np.searchsorted(self.ids, item_ids).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """One entry for each film of each row's history.

    Attributes:
        rows: index of the row.
        liked: code of the film in the history.
        films: code of the row's own film.
        moments: the row's time (s).
    """

    rows: Ints
    liked: Ints
    films: Ints
    moments: Ints

    def sum_by_row(self, values: NDArray[np.number], num_rows: int) -> Floats:
        """Add up one value a pair for every row."""
        return np.bincount(self.rows, values, minlength=num_rows).astype(np.float64)

    def max_by_row(self, values: Floats, num_rows: int) -> Floats:
        """Take the largest of one value ≥ 0 a pair for every row."""
        largest = np.zeros(num_rows)
        np.maximum.at(largest, self.rows, values)
        return largest


def past_features(known: pl.DataFrame, items: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Describe every row by what the strictly earlier known rows, its history and its film say.

    Args:
        known: rows with labels: user_id, item_id, label, timestamp, history_ids. They may be the
            rows themselves: a row never sees its own label.
        items: item_id, title, genres (names with ``|`` between).
        rows: user_id, item_id, timestamp, history_ids; a label is not read.

    Returns:
        Float columns in the order of the rows, nan where something is not known.

    Raises:
        DataError: a column is missing or holds something else.
    """
    films = _read_films(items, known, rows)
    columns = _count_columns(known, rows, films)
    columns |= _film_columns(films, films.codes(read_whole_numbers(rows, "item_id")))
    columns |= _history_columns(known, rows, films, columns)
    return pl.DataFrame(columns)


def _count_columns(known: pl.DataFrame, rows: pl.DataFrame, films: _Films) -> dict[str, Floats]:
    genres_by_item = {
        int(film): [name for name, flags in films.genres.items() if flags[code]]
        for code, film in enumerate(films.ids)
    }
    counts = statistics_from(known, rows, genres_by_item=genres_by_item)
    columns = {name: counts[name].cast(pl.Float64).to_numpy() for name in counts.columns}
    prior = columns.pop("global_share")
    columns["item_share"] = smoothed_share(
        columns["item_likes"], columns["item_count"], prior=prior, strength=_ITEM_STRENGTH
    )
    columns["user_share"] = smoothed_share(
        columns["user_likes"], columns["user_count"], prior=prior, strength=_USER_STRENGTH
    )
    columns["user_genre_share"] = smoothed_share(
        columns["user_genre_likes"],
        columns["user_genre_count"],
        prior=columns["user_share"],
        strength=_USER_STRENGTH,
    )
    columns["item_and_user_log_odds"] = (
        log_odds(columns["item_share"]) + log_odds(columns["user_share"]) - log_odds(prior)
    )
    return columns


def _film_columns(films: _Films, codes: Ints) -> dict[str, Floats]:
    flags = {
        f"is_{name}": values[codes].astype(np.float64) for name, values in films.genres.items()
    }
    num_genres = np.sum([np.zeros(len(codes)), *flags.values()], axis=0)
    return {"year": films.years[codes], "num_genres": num_genres, **flags}


def _history_columns(
    known: pl.DataFrame, rows: pl.DataFrame, films: _Films, columns: dict[str, Floats]
) -> dict[str, Floats]:
    num_rows = rows.height
    pairs, known_pairs = _read_pairs(rows, films), _read_pairs(known, films)
    length = np.bincount(pairs.rows, minlength=num_rows).astype(np.float64)

    def mean(values: NDArray[np.number]) -> Floats:
        total = pairs.sum_by_row(values, num_rows)
        return np.where(length > 0, total / np.maximum(length, 1), np.nan)

    rated, co_likes_before, co_likes_any_order = _count_pairs(known, known_pairs, pairs, films)
    co_count = pairs.sum_by_row(rated, num_rows)
    co_share = smoothed_share(
        pairs.sum_by_row(co_likes_before, num_rows),
        co_count,
        prior=columns["item_share"],
        strength=_PAIR_STRENGTH,
    )
    known_codes = films.codes(read_whole_numbers(known, "item_id"))
    count, likes = count_before(
        known_codes,
        read_whole_numbers(known, "timestamp"),
        read_labels(known),
        pairs.liked,
        pairs.moments,
    )
    # Cosine of the two films' sets of members who liked them: co-likes against popularity.
    cosine = co_likes_any_order / np.sqrt((likes + 1) * (columns["item_likes"][pairs.rows] + 1))
    shared_genres = np.zeros(len(pairs.rows), dtype=np.int64)
    for flags in films.genres.values():
        shared_genres += flags[pairs.liked] & flags[pairs.films]
    year = mean(films.years[pairs.liked])
    return {
        "history_length": length,
        "history_year": year,
        "year_gap": columns["year"] - year,
        "history_share": mean((likes + 1) / (count + 2)),
        "history_popularity": mean(np.log1p(count)),
        "history_genre_share": mean(shared_genres) / np.maximum(columns["num_genres"], 1),
        "co_count": co_count,
        "co_likes": pairs.sum_by_row(co_likes_any_order, num_rows),
        "co_share": co_share,
        "co_cosine_mean": mean(cosine),
        "co_cosine_max": pairs.max_by_row(cosine, num_rows),
    }


def _count_pairs(
    known: pl.DataFrame, known_pairs: _Pairs, pairs: _Pairs, films: _Films
) -> tuple[Ints, Ints, Ints]:
    """Count for each pair the earlier members who liked its one film and then met its other.

    Returns:
        Those who rated the row's film after they liked the history's film; those of them who
        liked it; those who liked both in either order.
    """
    num_films = len(films.ids)
    labels = read_labels(known)[known_pairs.rows]
    liked = labels == 1
    queries = pairs.liked * num_films + pairs.films
    rated, likes = count_before(
        known_pairs.liked * num_films + known_pairs.films,
        known_pairs.moments,
        labels,
        queries,
        pairs.moments,
    )
    reverse, _ = count_before(
        (known_pairs.films * num_films + known_pairs.liked)[liked],
        known_pairs.moments[liked],
        labels[liked],
        queries,
        pairs.moments,
    )
    return rated, likes, likes + reverse


def _read_films(items: pl.DataFrame, *tables: pl.DataFrame) -> _Films:
    for name in ("title", "genres"):
        if name not in items.columns or items[name].dtype != pl.String:
            raise DataError(f"{name}: should be a text column of the items")
    item_ids = read_whole_numbers(items, "item_id")
    parts = [read_whole_numbers(table, "item_id") for table in tables]
    histories = [_explode_history(table) for table in tables]
    ids = np.unique(np.concatenate([item_ids, *parts, *histories]))
    codes = np.searchsorted(ids, item_ids)
    years = np.full(len(ids), np.nan)
    found = items["title"].str.extract(r"\((\d{4})\)\s*$").cast(pl.Float64)
    years[codes] = found.to_numpy()
    lists = items["genres"].fill_null("").str.split("|").to_list()
    names = sorted({name for names in lists for name in names if name})
    genres = {name: np.zeros(len(ids), dtype=np.int64) for name in names}
    for code, row in zip(codes, lists, strict=True):
        for name in filter(None, row):
            genres[name][code] = 1
    return _Films(ids=ids, years=years, genres=genres)


def _read_pairs(rows: pl.DataFrame, films: _Films) -> _Pairs:
    lengths = rows["history_ids"].list.len().to_numpy()
    parents = np.repeat(np.arange(rows.height), lengths)
    return _Pairs(
        rows=parents,
        liked=films.codes(_explode_history(rows)),
        films=films.codes(read_whole_numbers(rows, "item_id"))[parents],
        moments=read_whole_numbers(rows, "timestamp")[parents],
    )


def _explode_history(rows: pl.DataFrame) -> Ints:
    column = rows.get_column("history_ids", default=None)
    if column is None or not isinstance(column.dtype, pl.List) or column.null_count():
        raise DataError("history_ids: should be a column of lists of item_ids")
    films = column.explode(empty_as_null=False).rename("history_ids").to_frame()
    # A frame in which every history is empty may not know what its lists would hold.
    return read_whole_numbers(films if films.height else films.cast(pl.Int64), "history_ids")
