"""MovieLens as GroupLens publishes it: 100k, 1M, 20M, 32M and the two "latest" sets.

    100k     u.data   user id, item id, rating (1-5), timestamp (s); tabs, no header
             u.item   id|title|release date|video date|IMDb address|19 flags of genres; latin-1
    1M       ratings.dat  UserID::MovieID::Rating::Timestamp; no header
             movies.dat   MovieID::Title::Genres ("Action|Sci-Fi"); latin-1
    others   ratings.csv  userId,movieId,rating (0.5-5),timestamp
             movies.csv   movieId,title,genres; titles with commas are quoted; UTF-8
             tags.csv     userId,movieId,tag,timestamp

Titles end in the year, "Matrix, The (1999)", and stay as they are. "(no genres listed)" is no
genre. 1M and 100k list some films twice under other ids: they stay two items.

Source: https://grouplens.org/datasets/movielens/. Licence: research use with acknowledgement, no
commercial use without permission; 100k, 1M and 20M may not be redistributed, 32M and latest may
under the same terms. F. M. Harper, J. A. Konstan, "The MovieLens Datasets: History and Context",
ACM TiiS 5(4), 2015.
"""

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.text_files import (
    MAYBE_TEXT,
    NUMBER,
    TEXT,
    WHOLE,
    check_rows,
    read_table,
)

_PAGE = "https://grouplens.org/datasets/movielens/"
_FILES = "https://files.grouplens.org/datasets/movielens/"
_TASKS = (
    "movie-like", "movie-rating", "similar-item",
    "movie-dislike", "movie-newcomer", "movie-next", "movie-premiere",
)  # fmt: skip
_NO_GENRES = "(no genres listed)"
# The order of the flags in u.item; u.genre lists the same.
# fmt: off
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
# fmt: on
_TAGS = {"member": pl.String, "item": pl.String, "tag": pl.String, "time": pl.Int64}
_RATING = {"user": TEXT, "item": TEXT, "rating": NUMBER, "timestamp": WHOLE}


def _convert_100k(files: SourceFiles, tables: TableWriter) -> None:
    flags = [f"flag {place}" for place in range(len(_GENRES))]
    columns = {
        "item": TEXT,
        "title": TEXT,
        "released": MAYBE_TEXT,
        "on video": MAYBE_TEXT,
        "address": MAYBE_TEXT,
        **dict.fromkeys(flags, WHOLE),
    }
    path = files.one("u.item")
    for frame in read_table(
        path, columns, separator="|", encoding="latin-1", header=False, quotes=False
    ):
        for flag in flags:
            check_rows(path, frame, pl.col(flag).is_in([0, 1]), "a genre's flag should be 0 or 1")
        names = [
            [name for name, flag in zip(_GENRES[1:], row[1:], strict=True) if flag]
            for row in frame.select(flags).iter_rows()
        ]
        tables.add_items(_items(frame, pl.Series(names, dtype=pl.List(pl.String))))
    path = files.one("u.data")
    for frame in read_table(path, _RATING, separator="\t", header=False, quotes=False):
        check_rows(path, frame, pl.col("rating").is_in([1.0, 2.0, 3.0, 4.0, 5.0]), _WHOLE_STARS)
        tables.add_events(_events(frame))


def _convert_1m(files: SourceFiles, tables: TableWriter) -> None:
    columns = {"item": TEXT, "title": TEXT, "genres": MAYBE_TEXT}
    for frame in read_table(
        files.one("movies.dat"),
        columns,
        separator="::",
        encoding="latin-1",
        header=False,
        quotes=False,
    ):
        tables.add_items(_items(frame, _split_genres(frame)))
    path = files.one("ratings.dat")
    for frame in read_table(path, _RATING, separator="::", header=False, quotes=False):
        check_rows(path, frame, pl.col("rating").is_in([1.0, 2.0, 3.0, 4.0, 5.0]), _WHOLE_STARS)
        tables.add_events(_events(frame))


def _convert_csv(files: SourceFiles, tables: TableWriter) -> None:
    columns = {"movieId": TEXT, "title": TEXT, "genres": MAYBE_TEXT}
    for frame in read_table(files.one("movies.csv"), columns):
        tables.add_items(_items(frame.rename({"movieId": "item"}), _split_genres(frame)))
    path = files.one("ratings.csv")
    columns = {"userId": TEXT, "movieId": TEXT, "rating": NUMBER, "timestamp": WHOLE}
    for frame in read_table(path, columns):
        stars = pl.col("rating").is_between(0.5, 5) & (pl.col("rating") * 2 % 1 == 0)
        check_rows(path, frame, stars, "rating should be 0.5 to 5 in half stars")
        tables.add_events(_events(frame.rename({"userId": "user", "movieId": "item"})))
    columns = {"userId": TEXT, "movieId": TEXT, "tag": MAYBE_TEXT, "timestamp": WHOLE}
    tables.add_tags(pl.DataFrame(schema=_TAGS))
    for frame in read_table(files.one("tags.csv"), columns):
        names = {"userId": "member", "movieId": "item", "timestamp": "time"}
        named = frame.rename(names).filter(pl.col("tag").is_not_null())
        tables.drop("empty tags", frame.height - named.height)
        tables.add_tags(named)


_WHOLE_STARS = "rating should be 1 to 5 stars"


def _items(frame: pl.DataFrame, categories: pl.Series) -> pl.DataFrame:
    return frame.select(
        "item",
        "title",
        year=pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32),
        categories=categories,
    )


def _split_genres(frame: pl.DataFrame) -> pl.Series:
    names = frame["genres"].replace(_NO_GENRES, None).fill_null("").str.split("|")
    return names.list.eval(pl.element().filter(pl.element() != ""))


def _events(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(
        member="user", item="item", action=pl.lit("rated"), value="rating", time="timestamp"
    )


def _csv_adapter(name: str, archive: str, size: str, checksum: str, licence: str) -> Adapter:
    return Adapter(
        name=name,
        domain="films",
        size=size,
        licence=licence,
        page=_PAGE,
        files=(_archive(archive, checksum),),
        parts=("movies.csv", "ratings.csv", "tags.csv"),
        tasks=(*_TASKS, "movie-search"),
        version=2,
        convert=_convert_csv,
    )


def _archive(name: str, checksum: str) -> RemoteFile:
    return RemoteFile(name=name, addresses=(_FILES + name,), checksum=checksum)


_CLOSED = "research use with acknowledgement; no redistribution, no commercial use"
_OPEN = "research use with acknowledgement; redistribution under the same terms, not commercial"
ADAPTERS = (
    Adapter(
        name="ml-100k",
        domain="films",
        size="100,000 ratings, 1,682 films; 5 MB",
        licence=_CLOSED,
        page=_PAGE,
        files=(_archive("ml-100k.zip", "md5:0e33842e24a9c977be4e0107933c0723"),),
        parts=("u.data", "u.item"),
        tasks=_TASKS,
        version=2,
        convert=_convert_100k,
    ),
    Adapter(
        name="ml-1m",
        domain="films",
        size="1,000,209 ratings, 3,883 films; 6 MB",
        licence=_CLOSED,
        page=_PAGE,
        files=(_archive("ml-1m.zip", "md5:c4d9eecfca2ab87c1945afe126590906"),),
        parts=("movies.dat", "ratings.dat"),
        tasks=_TASKS,
        version=2,
        convert=_convert_1m,
    ),
    _csv_adapter(
        "ml-20m",
        "ml-20m.zip",
        "20,000,263 ratings, 27,278 films; 190 MB",
        "md5:cd245b17a1ae2cc31bb14903e1204af3",
        _CLOSED,
    ),
    _csv_adapter(
        "ml-32m",
        "ml-32m.zip",
        "32,000,204 ratings, 87,585 films; 239 MB",
        "md5:d472be332d4daa821edc399621853b57",
        _OPEN,
    ),
    # These two are renewed from time to time: no checksum of theirs stays true.
    _csv_adapter(
        "ml-latest-small", "ml-latest-small.zip", "about 100,000 ratings; 1 MB", "", _OPEN
    ),
    _csv_adapter("ml-latest", "ml-latest.zip", "about 33,000,000 ratings; 335 MB", "", _OPEN),
)
