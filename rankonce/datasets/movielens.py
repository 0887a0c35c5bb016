"""MovieLens-like rows as requests of the task ``movie-like``.

    rows    user_id, item_id, label (1 = liked), timestamp (s), history_ids (liked before, oldest
            first)
    items   item_id, title, genres ("Action|Sci-Fi")

Statistics of members and films, and what members disliked, come from the train rows alone; a train
row sees only what was strictly earlier than itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.datasets.statistics import (
    Floats,
    log_odds,
    past_statistics,
    read_whole_numbers,
    smoothed_share,
    statistics_from,
)
from rankonce.errors import DataError
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

TASK = "movie-like"
# A film's or member's share counts as if this many rows of the average had come before.
_STRENGTH = 4.0
# The same where both averages are added; chosen on the later fifth of MovieLens-1M's train rows.
_FILM_STRENGTH, _MEMBER_STRENGTH = 5.0, 20.0


# film, liked, Unix seconds
PastEvent = tuple[int, bool, int]


@dataclass(frozen=True, kw_only=True)
class MovieRows:
    """Rows with everything that a prompt says of them.

    Attributes:
        rows: user_id, item_id, timestamp, history_ids, and label where it is known.
        films: title and genres of every film by its id.
        statistics: one row a row, from the train rows (see ``datasets.statistics``).
        moments: when a member rated a film.
        dislikes: for every member the films disliked in the train rows, oldest first.
    """

    rows: pl.DataFrame
    films: Mapping[int, Mapping[str, Value]]
    statistics: pl.DataFrame
    moments: Mapping[tuple[int, int], int]
    dislikes: Mapping[int, Sequence[PastEvent]]

    def history(self, index: int) -> list[PastEvent]:
        """Return what a row's member liked and disliked strictly before it, oldest first."""
        row = self.rows.row(index, named=True)
        user, now = row["user_id"], row["timestamp"]
        events: list[PastEvent] = []
        when = 0
        for film in row["history_ids"] or ():
            # A film of unknown date keeps its place behind the one before it.
            when = min(now, self.moments.get((user, film), when))
            events.append((film, True, when))
        events += [event for event in self.dislikes.get(user, ()) if event[2] < now]
        return sorted(events, key=lambda event: event[2])


def read_rows(path: Path) -> pl.DataFrame:
    """Read rows or items from Parquet.

    Raises:
        DataError: the file is not there or is not Parquet.
    """
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def read_films(items: pl.DataFrame) -> dict[int, dict[str, Value]]:
    """Take the fields of every film; genres become a list, left out where there are none."""
    read_whole_numbers(items, "item_id")
    if missing := {"title", "genres"} - set(items.columns):
        raise DataError(f"items: should have the columns {', '.join(sorted(missing))}")
    films: dict[int, dict[str, Value]] = {}
    for item_id, title, genres in items.select("item_id", "title", "genres").iter_rows():
        films[item_id] = {"title": title}
        if names := [name for name in (genres or "").split("|") if name and name[0] != "("]:
            films[item_id]["genres"] = names
    return films


def movie_rows(
    rows: pl.DataFrame, items: pl.DataFrame, *, train: pl.DataFrame | None = None
) -> MovieRows:
    """Join rows with what was known when they happened.

    Args:
        train: rows whose labels may be used; the rows themselves where they are the train part.

    Raises:
        DataError: a column is missing, or a row names a film that items does not have.
    """
    for name in ("user_id", "item_id", "timestamp"):
        read_whole_numbers(rows, name)
    _check_histories(rows)
    films = read_films(items)
    known = rows if train is None else train
    past = [film for ids in rows["history_ids"].to_list() for film in ids or ()]
    unknown = (set(rows["item_id"].to_list()) | set(past)) - set(films)
    if unknown:
        raise DataError(f"item_id: {sorted(unknown)[:5]} are in no row of items")
    genres = {film: _genres(fields) for film, fields in films.items()}
    if train is None:
        statistics = past_statistics(rows, genres_by_item=genres)
    else:
        statistics = statistics_from(train, rows, genres_by_item=genres)
    moments: dict[tuple[int, int], int] = {}
    for frame in (rows, known):
        keys = zip(frame["user_id"].to_list(), frame["item_id"].to_list(), strict=True)
        moments.update(zip(keys, frame["timestamp"].to_list(), strict=True))
    dislikes: dict[int, list[PastEvent]] = defaultdict(list)
    disliked = known.filter(pl.col("label") == 0).sort("timestamp", maintain_order=True)
    for user, film, when in disliked.select("user_id", "item_id", "timestamp").iter_rows():
        dislikes[user].append((film, False, when))
    return MovieRows(
        rows=rows, films=films, statistics=statistics, moments=moments, dislikes=dislikes
    )


def _check_histories(rows: pl.DataFrame) -> None:
    if "history_ids" not in rows.columns:
        raise DataError(f"history_ids: should be a column of the rows, which have {rows.columns}")
    histories = rows["history_ids"]
    inner = getattr(histories.dtype, "inner", None)
    if inner is None or not (inner.is_integer() or inner == pl.Null) or histories.null_count():
        raise DataError(f"history_ids: should be lists of whole numbers, are {histories.dtype}")
    if histories.list.drop_nulls().list.len().sum() < histories.list.len().sum():
        raise DataError("history_ids: should hold whole numbers without nulls")


def movie_examples(
    movies: MovieRows,
    *,
    candidates_per_example: int,
    seed: int | None = None,
    shared_history: bool = True,
    forgetting: float = 0.0,
    smoothing: float = 0.0,
) -> Iterator[TrainingExample]:
    """Group rows of a member, in the order of time, into examples.

    Args:
        candidates_per_example: rows of one example at most.
        seed: cut a member's rows at random places and order each example at random, differently
            for every seed; ``None`` cuts regularly and keeps the order.
        shared_history: all rows of an example get the profile and history of its first one, as of
            then, while each film is described as of its own row. Else
            only rows with the very same history and statistics of the member share an example.
        forgetting: the share of titles that become "untitled", year kept, and the largest share of
            events that are left out; needs a seed. A small set is else learnt by heart: a film by
            its title and a member by the history, instead of by what is said of them.
        smoothing: labels become soft: this part of them is the expected share that the prompt
            tells, which a few rows of one member and film cannot know better.
    """
    random = None if seed is None else np.random.default_rng(seed)
    by_member: dict[int, list[int]] = defaultdict(list)
    order = np.argsort(movies.rows["timestamp"].to_numpy(), kind="stable")
    users = movies.rows["user_id"].to_list()
    for index in order.tolist():
        by_member[users[index]].append(index)
    columns = _feature_columns(movies)
    for indices in by_member.values():
        for group in _groups(movies, indices, candidates_per_example, shared_history, random):
            example = _example(movies, columns, group, random, smoothing)
            yield _forget(example, forgetting, random) if forgetting and random else example


def _groups(
    movies: MovieRows,
    indices: Sequence[int],
    most: int,
    shared_history: bool,
    random: np.random.Generator | None,
) -> Iterator[list[int]]:
    liked, rated = movies.rows["history_ids"], movies.statistics["user_count"]

    def known(index: int) -> tuple[tuple[int, ...], int]:
        # The films liked before and the train rows before say everything that a prefix says.
        return tuple(liked[index]), int(rated[index])

    start = 0
    while start < len(indices):
        size = most if random is None else int(random.integers(max(1, most // 4), most + 1))
        end = start + 1
        first = known(indices[start])
        while end < min(start + size, len(indices)) and (
            shared_history or known(indices[end]) == first
        ):
            end += 1
        yield list(indices[start:end])
        start = end


def _feature_columns(movies: MovieRows) -> dict[str, Floats]:
    """The numbers that prompts say, as arrays over the rows."""
    counts = {
        name: movies.statistics[name].fill_null(0).to_numpy().astype(np.float64)
        for name in movies.statistics.columns
    }
    average = counts["global_share"]
    user_share = _share(counts, "user", _STRENGTH)
    film = log_odds(_share(counts, "item", _FILM_STRENGTH))
    member = log_odds(_share(counts, "user", _MEMBER_STRENGTH))
    return {
        "expected_like_share": 1 / (1 + np.exp(log_odds(average) - film - member)),
        "num_raters": counts["item_count"],
        "like_share": _share(counts, "item", _STRENGTH),
        "num_ratings": counts["user_count"],
        "user_like_share": user_share,
        "num_genre_ratings": counts["user_genre_count"],
        "genre_like_share": smoothed_share(
            counts["user_genre_likes"],
            counts["user_genre_count"],
            prior=user_share,
            strength=_STRENGTH,
        ),
    }


def _share(counts: Mapping[str, Floats], of: str, strength: float) -> Floats:
    return smoothed_share(
        counts[f"{of}_likes"],
        counts[f"{of}_count"],
        prior=counts["global_share"],
        strength=strength,
    )


def _example(
    movies: MovieRows,
    columns: Mapping[str, Floats],
    indices: list[int],
    random: np.random.Generator | None,
    smoothing: float,
) -> TrainingExample:
    first = indices[0]
    time = int(movies.rows["timestamp"][first])
    profile: dict[str, Value] = {"num_ratings": int(columns["num_ratings"][first])}
    if profile["num_ratings"]:
        profile["like_share"] = float(columns["user_like_share"][first])
    if random is not None:
        indices = [indices[place] for place in random.permutation(len(indices))]
    known = "label" in movies.rows.columns
    items = movies.rows["item_id"]
    return TrainingExample(
        request=ScoreRequest(
            task=TASK,
            time=float(time),
            profile=profile,
            history=tuple(
                Event(
                    item=Item(fields=movies.films[film]),
                    action="liked" if liked else "disliked",
                    time=float(when),
                )
                for film, liked, when in movies.history(first)
            ),
            candidates=tuple(
                Item(id=str(index), fields=film_fields(movies.films[items[index]], columns, index))
                for index in indices
            ),
        ),
        labels=tuple(
            _label(
                int(movies.rows["label"][index]), columns["expected_like_share"][index], smoothing
            )
            if known
            else None
            for index in indices
        ),
    )


def _label(liked: int, expected: float, smoothing: float) -> str | dict[str, float]:
    if not smoothing:
        return "Yes" if liked else "No"
    share = (1 - smoothing) * liked + smoothing * float(expected)
    return {"Yes": share, "No": 1 - share}


def _forget(example: TrainingExample, share: float, random: np.random.Generator) -> TrainingExample:
    request = example.request
    kept = random.random(len(request.history)) >= random.uniform(0, share)
    return replace(
        example,
        request=replace(
            request,
            history=tuple(
                replace(event, item=_untitle(event.item, share, random))
                for event, keep in zip(request.history, kept, strict=True)
                if keep
            ),
            candidates=tuple(_untitle(film, share, random) for film in request.candidates),
        ),
    )


def _untitle(film: Item, share: float, random: np.random.Generator) -> Item:
    if random.random() >= share:
        return film
    year = re.search(r"\(\d{4}\)$", str(film.fields["title"]))
    return replace(
        film, fields={**film.fields, "title": f"untitled {year.group() if year else ''}"}
    )


def film_fields(
    film: Mapping[str, Value], columns: Mapping[str, Floats], index: int
) -> dict[str, Value]:
    """Everything that the task says of a candidate; shares of nobody are left out."""
    fields: dict[str, Value] = dict(film)
    fields["expected_like_share"] = float(columns["expected_like_share"][index])
    if columns["num_raters"][index]:
        fields["num_raters"] = int(columns["num_raters"][index])
        fields["like_share"] = float(columns["like_share"][index])
    if columns["num_genre_ratings"][index]:
        fields["genre_like_share"] = float(columns["genre_like_share"][index])
    return fields


def _genres(fields: Mapping[str, Value]) -> list[str]:
    genres = fields.get("genres")
    return genres if isinstance(genres, list) else []
