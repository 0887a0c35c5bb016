"""Items and histories in words, as streams of documents.

Two forms of tables are read: the common form (``items.parquet`` and ``events.parquet`` of
``rankonce datasets``) and MovieLens-like ones (items with item_id, title and genres; rows with
user_id, item_id, timestamp, and rating or label).

How many rated an item and how many of these liked it is counted over all rows that are given, the
whole training corpus: a text of an item belongs to no moment. Texts of histories hold what happened
and no counts. What a later stage or an evaluation holds out must not be among the rows.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from rankonce.errors import DataError, RequestError
from rankonce.prompts.documents import DocumentWriter, document_writer
from rankonce.training.documents import Document, read_parquet_rows

# Stars; what lies between says neither.
_LIKE, _DISLIKE = 4.0, 3.0
# Actions whose value is a number of stars.
_STARRED = ("rated", "reviewed", "bought")
_ACTION_WORDS = {"shown": "passed over"}

# item: raters, and those of them who liked it
Counts = Mapping[Any, tuple[int, int]]
# member, item, action, stars, time
Row = tuple[Any, Any, str | None, float | None, int | None]


@dataclass(frozen=True, kw_only=True)
class TableForm:
    """The names of columns in one form of tables.

    Attributes:
        kind: the styles that write its items.
        columns: of the items table, by the field of the styles.
    """

    kind: str
    item: str
    columns: Mapping[str, str]


COMMON = TableForm(
    kind="item",
    item="item",
    columns={
        "title": "title",
        "text": "text",
        "categories": "categories",
        "brand": "brand",
        "year": "year",
    },
)
MOVIELENS = TableForm(kind="film", item="item_id", columns={"title": "title", "genres": "genres"})


def read_items(path: Path, form: TableForm, counts: Counts, *, seed: int) -> Iterator[Document]:
    """Read items, each in a style drawn by the seed; those without a title are left out.

    Args:
        counts: what is known of the raters of an item; may be empty.
    """
    writer, random = document_writer(form.kind), Random(seed)
    num_rows = pq.read_metadata(path).num_rows
    for row, (item, fields) in enumerate(_item_fields(path, form), start=1):
        if not fields["title"]:
            continue
        raters, likes = counts.get(item, (0, 0))
        if raters:
            fields |= {"num_raters": raters, "like_share": likes / raters}
        where = f"{path}: row {row}"
        words = _spell(writer, fields, where)
        text = writer.write([words], random.choice(writer.styles))
        yield Document(text=text, place=row / num_rows, where=where)


def read_histories(
    rows: Iterable[Row], items: Path, form: TableForm, *, num_rows: int, seed: int
) -> Iterator[Document]:
    """Read the rows of each member, which stand together in the order of time, as one document.

    Each comes in a style drawn by the seed. Events without an action or of items without a title
    are left out, and members of whom nothing is left. Titles and categories of all items are held
    in memory.

    Args:
        num_rows: of all members, to say how far the reading is.

    Raises:
        DataError: a member's rows are not in the order of time.
    """
    writer, random = document_writer("history"), Random(seed)
    known = _titles(items, form, writer)
    done = 0
    for member, events in groupby(rows, key=itemgetter(0)):
        where = f"member {member}"
        words, before = [], -(2**63)
        for _, item, action, stars, time in events:
            done += 1
            if time is not None:
                if time < before:
                    raise DataError(f"{where}: rows should be in the order of time")
                before = time
            if item in known and action:
                words.append({**known[item], **_spell_action(action, stars)})
        if words:
            text = writer.write(words, random.choice(writer.styles))
            yield Document(text=text, place=done / num_rows, where=where)


def read_common_rows(path: Path, *, until: float | None) -> Iterator[Row]:
    """Read events of the common form.

    Args:
        until: Unix seconds; events at and after it are left out.
    """
    columns = ["member", "item", "action", "value", "time"]
    for member, item, action, value, time in read_parquet_rows(path, columns):
        if until is None or time is None or time < until:
            yield member, item, action, value if action in _STARRED else None, time


def read_movielens_rows(path: Path, *, until: float | None) -> Iterator[Row]:
    """Read MovieLens-like rows; their numbers are sorted by member and time in memory.

    Rows without a member, film, time or value are left out.
    """
    frame = _movielens(path, until=until).sort("user_id", "timestamp", maintain_order=True)
    has_stars = "rating" in frame.collect_schema().names()
    for user, item, time, value in frame.collect().iter_rows():
        if has_stars:
            yield user, item, "rated", value, time
        else:
            yield user, item, "liked" if value else "disliked", None, time


def count_untitled(items: Path, form: TableForm) -> int:
    """Count the items without a title, which make no text."""
    untitled = pl.scan_parquet(items).filter(~_is_titled(form))
    return int(untitled.select(pl.len()).collect(engine="streaming").item())


def count_unread(rows: Path, items: Path, form: TableForm) -> int:
    """Count the rows that no history holds: with a null, without an action or a titled item."""
    everything = pl.scan_parquet(rows)
    if form is MOVIELENS:
        whole = _movielens(rows, until=None).rename({"item_id": "item"})
    else:
        whole = everything.filter(pl.col("action").is_not_null() & (pl.col("action") != ""))
    # Tables may hold their numbers in other widths.
    name = pl.col("item").cast(pl.String)
    known = pl.scan_parquet(items).filter(_is_titled(form)).select(item=form.item)
    read = whole.with_columns(name).join(known.with_columns(name), on="item", how="semi")
    counts = [
        int(frame.select(pl.len()).collect(engine="streaming").item())
        for frame in (everything, read)
    ]
    return counts[0] - counts[1]


def _is_titled(form: TableForm) -> pl.Expr:
    title = pl.col(form.columns["title"]).cast(pl.String)
    return title.str.strip_chars().fill_null("") != ""


def count_common(path: Path, *, until: float | None) -> dict[Any, tuple[int, int]]:
    """Count raters and likes of every item over all events with stars."""
    events = pl.scan_parquet(path).filter(pl.col("action").is_in(_STARRED))
    if until is not None:
        events = events.filter(pl.col("time").is_null() | (pl.col("time") < until))
    return _count(events.select("item", liked=_liked("value")))


def count_movielens(path: Path, *, until: float | None) -> dict[Any, tuple[int, int]]:
    """Count raters and likes of every film over all rows."""
    rows = _movielens(path, until=until)
    liked = _liked("rating") if "rating" in rows.collect_schema().names() else pl.col("label") == 1
    return _count(rows.select(item="item_id", liked=liked))


def _movielens(path: Path, *, until: float | None) -> pl.LazyFrame:
    rows = pl.scan_parquet(path)
    value = "rating" if "rating" in rows.collect_schema().names() else "label"
    chosen = rows.select("user_id", "item_id", "timestamp", value).drop_nulls()
    return chosen if until is None else chosen.filter(pl.col("timestamp") < until)


def _liked(name: str) -> pl.Expr:
    """True or false for a clear like or dislike, null for what says neither."""
    value = pl.col(name)
    return pl.when(value >= _LIKE).then(True).when(value <= _DISLIKE).then(False)


def _count(rows: pl.LazyFrame) -> dict[Any, tuple[int, int]]:
    clear = rows.filter(pl.col("liked").is_not_null())
    counted = clear.group_by("item").agg(raters=pl.len(), likes=pl.col("liked").sum())
    frame = counted.collect(engine="streaming")
    return {item: (raters, likes) for item, raters, likes in frame.iter_rows()}


def _item_fields(path: Path, form: TableForm) -> Iterator[tuple[Any, dict[str, Any]]]:
    for item, *values in read_parquet_rows(path, [form.item, *form.columns.values()]):
        fields = dict(zip(form.columns, values, strict=True))
        if form is MOVIELENS:
            # "(no genres listed)" is no genre.
            names = (fields["genres"] or "").split("|")
            fields["genres"] = [name for name in names if name and name[0] != "("]
        fields["title"] = (fields["title"] or "").strip()
        yield item, fields


def _titles(path: Path, form: TableForm, writer: DocumentWriter) -> dict[Any, dict[str, str]]:
    found = {}
    for row, (item, fields) in enumerate(_item_fields(path, form), start=1):
        if fields["title"]:
            known = {
                "action": "-",
                "title": fields["title"],
                "categories": fields.get("categories") or fields.get("genres"),
            }
            found[item] = _spell(writer, known, f"{path}: row {row}")
    return found


def _spell(writer: DocumentWriter, fields: Mapping[str, Any], where: str) -> dict[str, str]:
    try:
        return writer.spell(fields)
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error


def _spell_action(action: str, stars: float | None) -> dict[str, str]:
    words = {"action": _ACTION_WORDS.get(action, action)}
    if stars is not None:
        words["stars"] = f"{stars:g}"
        if action == "rated" and stars >= _LIKE:
            words["action"] = "liked"
        elif action == "rated" and stars <= _DISLIKE:
            words["action"] = "disliked"
    return words
