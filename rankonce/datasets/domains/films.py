"""Films: MovieLens latest-small behind the film tasks.

    ratings   user_id, item_id, rating (0.5-5), timestamp (s)
    items     item_id, title, genres
    tags      user_id, item_id, tag, timestamp

A request is asked at the moment of its first row: histories and statistics hold what was strictly
earlier. Nobody saw these films in a list: where a task needs films that were not chosen, they are
drawn as often as others had rated them by then.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankonce.datasets.ml_small import read_ratings, read_tags
from rankonce.datasets.movielens import read_films
from rankonce.datasets.rating_examples import (
    RATING_TASKS,
    ExampleConfig,
    Ratings,
    rating_examples,
)
from rankonce.datasets.statistics import read_past, read_questions, statistics_from
from rankonce.prompts.features import (
    YEAR,
    Floats,
    popularity_percentile,
    smoothed_share,
    standing_percentile,
)
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

_LIKE, _DISLIKE = 4.0, 2.0
_STRENGTH = 4.0
_CANDIDATES = 10
# The newest events that a request carries.
MAX_EVENTS = 40
_NAMED = 3
# With fewer raters than this a film counts as new.
_FEW_RATERS = 5
Rating = tuple[int, float, int]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request to be: who, when, and films with their labels."""

    user: int
    time: int
    films: Sequence[tuple[int, str]]
    profile: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class FilmTask:
    """How a film task is made of ratings.

    Attributes:
        ask: makes the requests.
        candidate, profile: the task's statistics by name, of those in ``_numbers``.
        action: the word for a rating in the history, ``None`` leaves the rating out; without an
            action the task takes no history.
        event: fields of the history's films.
    """

    ask: "Callable[[FilmData, np.random.Generator], Iterator[Asked]]"
    candidate: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, str] = field(default_factory=dict)
    action: Callable[[float], str | None] | None = None
    event: Sequence[str] = ("title", "genres")


class FilmData:
    """The files of a folder, with each member's ratings in the order of time.

    Args:
        max_members: of the first members alone requests are made; all ratings count.
    """

    def __init__(self, folder: Path, *, max_members: int | None = None) -> None:
        self.folder = folder
        ratings, items = read_ratings(folder)
        self.ratings = ratings.sort("timestamp", "user_id", "item_id")
        self.films = read_films(items)
        self.by_member: dict[int, list[Rating]] = {}
        members = self.ratings["user_id"].unique().sort().head(max_members or self.ratings.height)
        asking = self.ratings.filter(pl.col("user_id").is_in(members.implode()))
        columns = asking.select("user_id", "item_id", "rating", "timestamp")
        for user, film, rating, time in columns.iter_rows():
            self.by_member.setdefault(user, []).append((film, rating, time))
        self.rated = self.ratings["item_id"].to_numpy()
        self.times = self.ratings["timestamp"].to_numpy()

    @cached_property
    def likes(self) -> pl.DataFrame:
        """The ratings with a label of 1 for liked."""
        return self.ratings.with_columns(label=(pl.col("rating") >= _LIKE).cast(pl.Int8))

    def before(self, user: int, time: int) -> Sequence[Rating]:
        """The member's ratings strictly before a moment, oldest first."""
        rows = self.by_member[user]
        return rows[: bisect_left(rows, time, key=itemgetter(2))]

    def mean_before(self, user: int, time: int) -> float | None:
        """The mean of the member's ratings before a moment, ``None`` where there is none."""
        count = len(self.before(user, time))
        return self._rating_sums[user][count - 1] / count if count else None

    @cached_property
    def _rating_sums(self) -> dict[int, list[float]]:
        # Halves are added without rounding, whatever the order.
        return {
            user: list(accumulate(rating for _, rating, _ in rows))
            for user, rows in self.by_member.items()
        }

    def draw_others(
        self, user: int, time: int, count: int, random: np.random.Generator, besides: Sequence[int]
    ) -> list[int]:
        """Draw films that the member never rated, as often as others had rated them by then."""
        known = int(np.searchsorted(self.times, time))
        if not known:
            return []
        own = self._rated_by[user] | set(besides)
        drawn = self.rated[random.integers(known, size=6 * count)].tolist()
        return list(dict.fromkeys(film for film in drawn if film not in own))[:count]

    @cached_property
    def _rated_by(self) -> dict[int, set[int]]:
        return {user: {film for film, _, _ in rows} for user, rows in self.by_member.items()}


def film_examples(task: str, folder: Path, *, seed: int = 0) -> Iterator[TrainingExample]:
    """Make the examples of a film task, member by member.

    Args:
        folder: as in ``datasets.ml_small``.

    Raises:
        DataError: a file or a column is missing.
    """
    for _, example in film_examples_by_member(task, folder, seed=seed):
        yield example


def film_examples_by_member(
    task: str,
    folder: Path,
    *,
    seed: int = 0,
    max_members: int | None = None,
    max_events: int | None = MAX_EVENTS,
) -> Iterator[tuple[int, TrainingExample]]:
    """Make the examples of ``film_examples``, each with the user_id of its member.

    Args:
        max_members: make those of the first members alone.
        max_events: newest events of the member in each request; ``None`` is all of them, of
            ``movie-like`` the newest 60.
    """
    if task in RATING_TASKS:
        config = ExampleConfig(
            candidates_per_example=_CANDIDATES,
            max_members=max_members,
            max_history=max_events,
            co_likes=True,
            seed=seed,
        )
        yield from rating_examples(_read_ratings(folder), task, config)
        return
    data, made = FilmData(folder, max_members=max_members), FILM_TASKS[task]
    asked = [a for a in made.ask(data, np.random.default_rng(seed)) if a.films]
    numbers = _numbers(data, asked)
    items = {
        film: Item(fields={name: value for name, value in fields.items() if name in made.event})
        for film, fields in data.films.items()
    }
    row = 0
    for number, one in enumerate(asked):
        rows = range(row, row + len(one.films))
        row = rows.stop
        request = ScoreRequest(
            task=task,
            id=f"{task}-{number}",
            time=float(one.time),
            profile={**one.profile, **_pick(made.profile, numbers, rows[0])},
            history=_history(data, one, made, items, max_events),
            candidates=tuple(
                Item(
                    id=str(film),
                    fields={**data.films[film], **_pick(made.candidate, numbers, place)},
                )
                for place, (film, _) in zip(rows, one.films, strict=True)
            ),
        )
        labels = tuple(label for _, label in one.films)
        yield one.user, TrainingExample(request=request, labels=labels)


def _read_ratings(folder: Path) -> Ratings:
    ratings, items = read_ratings(folder)
    fields = read_films(items)
    known = ratings.filter(pl.col("item_id").is_in(list(fields)))
    return Ratings(
        rows=known.rename({"rating": "value"}).sort("user_id", "timestamp", "item_id"),
        fields=fields,
        names={film: str(film) for film in fields},
    )


def _pick(
    wanted: Mapping[str, str], numbers: Mapping[str, Sequence[Any]], row: int
) -> dict[str, Value]:
    found = {name: numbers[source][row] for name, source in wanted.items()}
    return {name: value for name, value in found.items() if value is not None}


def _numbers(data: FilmData, asked: Sequence[Asked]) -> dict[str, list[Any]]:
    """What was known of members and films when each request was asked, a value a candidate."""
    flat = [(one.user, film, one.time) for one in asked for film, _ in one.films]
    rows = pl.DataFrame(
        flat,
        schema={"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64},
        orient="row",
    )
    genres = {f: g if isinstance(g := x.get("genres"), list) else [] for f, x in data.films.items()}
    past = statistics_from(data.likes, rows, genres_by_item=genres)
    shares: dict[str, list[Any]] = {}
    for of in ("item", "user", "user_genre"):
        count = past[f"{of}_count"].fill_null(0).to_numpy()
        likes = past[f"{of}_likes"].fill_null(0).to_numpy()
        prior = past["global_share"].to_numpy()
        share = smoothed_share(likes, count, prior=prior, strength=_STRENGTH)
        shares[of] = [s if c else None for s, c in zip(share.tolist(), count.tolist(), strict=True)]
    known, questions = read_past(data.likes), read_questions(rows)
    standing = standing_percentile(known, questions, num_items=len(data.films), period_s=YEAR)
    means = [
        mean for one in asked for mean in [data.mean_before(one.user, one.time)] * len(one.films)
    ]
    return {
        "num_raters": past["item_count"].to_list(),
        "like_share": shares["item"],
        "num_ratings": past["user_count"].to_list(),
        "member_like_share": shares["user"],
        "genre_like_share": shares["user_genre"],
        "mean_rating": means,
        "percentile": _known(standing),
        "last_year": _known(popularity_percentile(known, questions, period_s=YEAR)),
        "film_age": [_film_age(data.films[film], time) for _, film, time in flat],
    }


def _known(numbers: Floats) -> list[float | None]:
    return [None if np.isnan(one) else one for one in numbers.tolist()]


def _film_age(film: Mapping[str, Value], time: int) -> float | None:
    """Seconds since the year in a title's last brackets began."""
    year = re.search(r"\((\d{4})\)\s*$", str(film["title"]))
    return max(0.0, time - (int(year.group(1)) - 1970) * YEAR) if year else None


def _history(
    data: FilmData,
    one: Asked,
    made: FilmTask,
    items: Mapping[int, Item],
    max_events: int | None,
) -> tuple[Event, ...]:
    if made.action is None:
        return ()
    told = (
        (film, word, time)
        for film, rating, time in reversed(data.before(one.user, one.time))
        if (word := made.action(rating))
    )
    events = [
        Event(item=items[film], action=word, time=float(time))
        for film, word, time in islice(told, max_events)
    ]
    return tuple(events[::-1])


def _liked(rating: float) -> str | None:
    return "liked" if rating >= _LIKE else "disliked" if rating <= _DISLIKE + 1 else None


def _cut(rows: Sequence[Rating]) -> Iterator[Sequence[Rating]]:
    for start in range(0, len(rows), _CANDIDATES):
        yield rows[start : start + _CANDIDATES]


def _by_rating(label: Callable[[float], str]) -> Callable[..., Iterator[Asked]]:
    """Every rating stands once as a candidate, those of one member together."""

    def ask(data: FilmData, random: np.random.Generator) -> Iterator[Asked]:
        for user, rows in data.by_member.items():
            for part in _cut(rows):
                films = [(film, label(rating)) for film, rating, _ in part]
                yield Asked(user=user, time=part[0][2], films=films)

    return ask


def _next_film(data: FilmData, random: np.random.Generator) -> Iterator[Asked]:
    """The film rated next, for the one watched next, among films that the member never rated."""
    for user, rows in data.by_member.items():
        for film, _, time in rows[5::_CANDIDATES]:
            others = data.draw_others(user, time, _CANDIDATES - 1, random, [film])
            films = [(film, "Yes"), *((other, "No") for other in others)]
            order = random.permutation(len(films)).tolist()
            yield Asked(user=user, time=time, films=[films[place] for place in order])


def _newcomer(data: FilmData, random: np.random.Generator) -> Iterator[Asked]:
    """The first films that a member liked stand for those named on joining."""
    for user, rows in data.by_member.items():
        liked = [place for place, row in enumerate(rows) if row[1] >= _LIKE][:_NAMED]
        if len(liked) == _NAMED:
            later = rows[liked[-1] + 1 :][:_CANDIDATES]
            named = [data.films[rows[place][0]]["title"] for place in liked]
            films = [(film, "Yes" if rating >= _LIKE else "No") for film, rating, _ in later]
            time = later[0][2] if later else 0
            yield Asked(user=user, time=time, films=films, profile={"named_films": named})


def _premiere(data: FilmData, random: np.random.Generator) -> Iterator[Asked]:
    """Films that few had rated when the member did."""
    new: dict[int, list[Rating]] = {}
    few = data.ratings.filter(pl.int_range(pl.len()).over("item_id") < _FEW_RATERS)
    for user, film, rating, time in few.select(
        "user_id", "item_id", "rating", "timestamp"
    ).iter_rows():
        if user in data.by_member:
            new.setdefault(user, []).append((film, rating, time))
    for user, rows in new.items():
        for part in _cut(rows):
            films = [(film, "Yes" if rating >= _LIKE else "No") for film, rating, _ in part]
            yield Asked(user=user, time=part[0][2], films=films)


def _search(data: FilmData, random: np.random.Generator) -> Iterator[Asked]:
    """A member's tag as a query: the films that got it from anybody, among others."""
    tags = read_tags(data.folder).sort("timestamp", "user_id", "item_id")
    tagged: dict[str, set[int]] = {}
    for film, tag in tags.select("item_id", "tag").iter_rows():
        tagged.setdefault(str(tag).strip().lower(), set()).add(film)
    for user, tag, time in (
        tags.select("user_id", "tag", "timestamp")
        .unique(["user_id", "tag"], keep="first", maintain_order=True)
        .iter_rows()
    ):
        query = str(tag).strip().lower()
        if user not in data.by_member or not query or not tagged[query] & set(data.films):
            continue
        fitting = sorted(tagged[query] & set(data.films))
        some = random.permutation(fitting)[: _CANDIDATES // 2].tolist()
        others = data.draw_others(user, time, _CANDIDATES - len(some), random, fitting)
        films = [*((film, "Yes") for film in some), *((film, "No") for film in others)]
        order = random.permutation(len(films)).tolist()
        yield Asked(
            user=user,
            time=time,
            films=[films[place] for place in order],
            profile={"query": query},
        )


FILM_TASKS: Mapping[str, FilmTask] = {
    "movie-dislike": FilmTask(
        ask=_by_rating(lambda rating: "Yes" if rating <= _DISLIKE else "No"),
        candidate={"num_raters": "num_raters", "genre_like_share": "genre_like_share"},
        profile={"mean_rating": "mean_rating"},
        action=_liked,
    ),
    "movie-newcomer": FilmTask(
        ask=_newcomer,
        candidate={"popularity": "percentile", "like_share": "like_share"},
    ),
    "movie-next": FilmTask(
        ask=_next_film,
        candidate={
            "popularity": "percentile",
            "lately": "last_year",
            "released": "film_age",
        },
        profile={"num_ratings": "num_ratings"},
        action=lambda rating: "watched",
        event=("title",),
    ),
    "movie-premiere": FilmTask(
        ask=_premiere,
        candidate={"released": "film_age", "genre_like_share": "genre_like_share"},
        profile={"num_ratings": "num_ratings", "like_share": "member_like_share"},
        action=_liked,
    ),
    "movie-search": FilmTask(
        ask=_search,
        candidate={"num_raters": "num_raters", "like_share": "like_share"},
    ),
}
