"""MovieLens-like rows as requests of the task ``movie-like``.

    rows    user_id, item_id, label (1 = liked), timestamp (s), history_ids (liked before, oldest
            first)
    items   item_id, title, genres ("Action|Sci-Fi")

What prompts say of members and films comes from the train rows alone (``prompts.features``); a
train row sees only what was strictly earlier than itself. The history holds likes: dislikes are
known of the train rows only, and a history in which they stop while likes go on would teach a
ranker what is no more true when it serves. They count in the numbers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.datasets.statistics import read_past, read_questions, read_whole_numbers
from rankonce.errors import DataError
from rankonce.prompts.features import (
    Floats,
    PastEvents,
    Questions,
    Rates,
    co_liked_neighbours,
    expected_share,
    genre_affinity,
    genre_rates,
    history_share,
    item_rates,
    member_rates,
    overall_share,
)
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

TASK = "movie-like"
# A film's or member's share counts as if this many rows of the average had come before.
_FILM_STRENGTH, _MEMBER_STRENGTH, _NEIGHBOUR_STRENGTH = 5.0, 10.0, 10.0

# What the candidates and the profile say, by the names of the task's fields.
_CANDIDATE_FIELDS = (
    "expected_like_share", "num_raters", "like_share", "genre_like_share",
    "neighbour_like_share", "co_liked", "closest_co_liked",
)  # fmt: skip
_PROFILE_FIELDS = ("num_ratings", "member_like_share", "liked_share")


@dataclass(frozen=True, kw_only=True)
class MovieRows:
    """Rows with everything that a prompt says of them.

    Attributes:
        rows: user_id, item_id, timestamp, history_ids, and label where it is known.
        films: title and genres of every film by its id.
        numbers: one number a row by the name of its field; nan where nothing is known.
        moments: when a member rated a film.
        taught: P(liked) of every row, which takes the place of the labels; no prompt says it.
    """

    rows: pl.DataFrame
    films: Mapping[int, Mapping[str, Value]]
    numbers: Mapping[str, Floats]
    moments: Mapping[tuple[int, int], int]
    taught: Floats | None = None

    def history(self, index: int) -> list[tuple[int, int]]:
        """Return what a row's member liked strictly before it and when, oldest first."""
        row = self.rows.row(index, named=True)
        user, now = row["user_id"], row["timestamp"]
        events: list[tuple[int, int]] = []
        when = 0
        for film in row["history_ids"] or ():
            # A film of unknown date keeps its place behind the one before it.
            when = max(when, min(now, self.moments.get((user, film), when)))
            events.append((film, when))
        return events


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
    rows: pl.DataFrame,
    items: pl.DataFrame,
    *,
    train: pl.DataFrame | None = None,
    taught: Floats | None = None,
) -> MovieRows:
    """Join rows with what was known when they happened.

    Args:
        train: rows whose labels may be used; the rows themselves where they are the train part.
        taught: see ``MovieRows``.

    Raises:
        DataError: a column is missing, or a row names a film that items does not have.
    """
    for name in ("user_id", "item_id", "timestamp"):
        read_whole_numbers(rows, name)
    films = read_films(items)
    known = rows if train is None else train
    asked = read_questions(rows)
    if asked.histories is None:
        raise DataError(f"history_ids: should be a column of the rows, which have {rows.columns}")
    liked = {film for history in asked.histories for film in history}
    unknown = (set(rows["item_id"].to_list()) | liked) - set(films)
    if unknown:
        raise DataError(f"item_id: {sorted(unknown)[:5]} are in no row of items")
    past = read_past(known)
    moments: dict[tuple[int, int], int] = {}
    for frame in (rows, known):
        keys = zip(frame["user_id"].to_list(), frame["item_id"].to_list(), strict=True)
        moments.update(zip(keys, frame["timestamp"].to_list(), strict=True))
    return MovieRows(
        rows=rows,
        films=films,
        numbers=movie_numbers(past, asked, films),
        moments=moments,
        taught=taught,
    )


def movie_numbers(
    past: PastEvents,
    asked: Questions,
    films: Mapping[int, Mapping[str, Value]],
) -> dict[str, Floats]:
    """Compute what prompts say in numbers, by the names of the task's fields.

    Args:
        past: without histories what others liked together is not known.
        asked: with the members' histories.
        films: title and genres by id.
    """
    genres = {film: _genres(fields) for film, fields in films.items()}
    overall = overall_share(past, asked)
    item, member = item_rates(past, asked), member_rates(past, asked)
    genre = genre_rates(past, asked, genres_by_item=genres)
    film_share = item.share(prior=overall, strength=_FILM_STRENGTH)
    member_share = member.share(prior=overall, strength=_MEMBER_STRENGTH)
    co_liked = closest = neighbour_share = np.full(len(overall), np.nan)
    if past.histories is not None:
        neighbours = co_liked_neighbours(past, asked)
        has_history = np.array([len(history) > 0 for history in asked.histories or ()])
        co_liked = np.where(has_history, neighbours.mean_cosine, np.nan)
        closest = np.where(has_history, neighbours.max_cosine, np.nan)
        rates = Rates(counts=neighbours.counts, likes=neighbours.likes)
        neighbour_share = np.where(
            rates.counts > 0, rates.share(prior=film_share, strength=_NEIGHBOUR_STRENGTH), np.nan
        )
    return {
        "expected_like_share": expected_share(
            item,
            member,
            overall=overall,
            item_strength=_FILM_STRENGTH,
            member_strength=_MEMBER_STRENGTH,
        ),
        "num_raters": item.counts,
        "like_share": np.where(item.counts > 0, film_share, np.nan),
        "genre_like_share": np.where(
            np.nan_to_num(genre.counts) > 0,
            genre_affinity(genre, member, overall=overall, strength=_MEMBER_STRENGTH),
            np.nan,
        ),
        "neighbour_like_share": neighbour_share,
        "co_liked": co_liked,
        "closest_co_liked": closest,
        "num_ratings": member.counts,
        "member_like_share": np.where(member.counts > 0, member_share, np.nan),
        "liked_share": history_share(past, asked),
    }


def movie_examples(
    movies: MovieRows,
    *,
    candidates_per_example: int,
    seed: int | None = None,
    shared_history: bool = True,
) -> Iterator[TrainingExample]:
    """Group rows of a member, in the order of time, into examples.

    Args:
        candidates_per_example: rows of one example at most.
        seed: cut a member's rows at random places and order each example at random, differently
            for every seed; ``None`` cuts regularly and keeps the order.
        shared_history: all rows of an example get the profile and history of its first one, as of
            then, while each film is described as of its own row. Else
            only rows with the very same history and statistics of the member share an example.
    """
    random = None if seed is None else np.random.default_rng(seed)
    by_member: dict[int, list[int]] = defaultdict(list)
    order = np.argsort(movies.rows["timestamp"].to_numpy(), kind="stable")
    users = movies.rows["user_id"].to_list()
    for index in order.tolist():
        by_member[users[index]].append(index)
    for indices in by_member.values():
        for group in _groups(movies, indices, candidates_per_example, shared_history, random):
            yield _example(movies, group, random)


def _groups(
    movies: MovieRows,
    indices: Sequence[int],
    most: int,
    shared_history: bool,
    random: np.random.Generator | None,
) -> Iterator[list[int]]:
    liked, rated = movies.rows["history_ids"], movies.numbers["num_ratings"]

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


def _example(
    movies: MovieRows,
    indices: list[int],
    random: np.random.Generator | None,
) -> TrainingExample:
    first = indices[0]
    time = int(movies.rows["timestamp"][first])
    if random is not None:
        indices = [indices[place] for place in random.permutation(len(indices))]
    items = movies.rows["item_id"]
    return TrainingExample(
        request=ScoreRequest(
            task=TASK,
            time=float(time),
            profile=_profile(movies, first),
            history=tuple(
                Event(item=Item(fields=movies.films[film]), action="liked", time=float(when))
                for film, when in movies.history(first)
            ),
            candidates=tuple(
                Item(id=str(index), fields=_candidate(movies, items[index], index))
                for index in indices
            ),
        ),
        labels=tuple(_label(movies, index) for index in indices),
    )


def _profile(movies: MovieRows, index: int) -> dict[str, Value]:
    fields = _numbers_of(movies, _PROFILE_FIELDS, index)
    if "member_like_share" in fields:
        fields["like_share"] = fields.pop("member_like_share")
    return {"num_ratings": 0, **fields}


def _candidate(movies: MovieRows, film: int, index: int) -> dict[str, Value]:
    fields: dict[str, Value] = dict(movies.films[film])
    fields |= _numbers_of(movies, _CANDIDATE_FIELDS, index)
    if not fields["num_raters"]:
        del fields["num_raters"]
    return fields


def _numbers_of(movies: MovieRows, names: Sequence[str], index: int) -> dict[str, Value]:
    """Take the numbers of a row that are known."""
    found: dict[str, Value] = {}
    for name in names:
        value = float(movies.numbers[name][index])
        if not np.isnan(value):
            found[name] = int(value) if name.startswith("num_") else value
    return found


def _label(movies: MovieRows, index: int) -> str | dict[str, float] | None:
    if movies.taught is not None:
        share = float(movies.taught[index])
        return {"Yes": share, "No": 1 - share}
    liked = movies.rows["label"][index] if "label" in movies.rows.columns else None
    return None if liked is None else "Yes" if liked else "No"


def _genres(fields: Mapping[str, Value]) -> list[str]:
    genres = fields.get("genres")
    return genres if isinstance(genres, list) else []
