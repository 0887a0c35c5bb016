"""What a file or folder holds, told by its name and columns, and how it is read as texts."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rankonce.errors import DataError
from rankonce.training.documents import (
    Corpus,
    Document,
    read_json_texts,
    read_parquet_texts,
    read_text_file,
)
from rankonce.training.verbalised import (
    COMMON,
    MOVIELENS,
    TableForm,
    count_common,
    count_movielens,
    count_unread,
    count_untitled,
    read_common_rows,
    read_histories,
    read_items,
    read_movielens_rows,
)

ITEMS = "items.parquet"
# Beside items in a folder, the first of these that is there; other files there are not read.
_ROWS = ("events.parquet", "train.parquet", "ratings.parquet")
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_COMMON_ITEMS = {COMMON.item, *COMMON.columns.values()}
_COMMON_EVENTS = {"member", "item", "action", "value", "time"}
_FILMS = {MOVIELENS.item, *MOVIELENS.columns.values()}
_FILM_ROWS = {"user_id", "item_id", "timestamp"}
_WANTED = (
    "should be text, or items (item, title, text, categories, brand, year), events (member, item, "
    "action, value, time), films (item_id, title, genres) or ratings (user_id, item_id, timestamp, "
    "and rating or label)"
)


def open_corpora(path: Path, *, weight: float = 1.0, until: float | None = None) -> list[Corpus]:
    """Find out what a file or a folder holds.

    A folder with ``items.parquet`` and events, train rows or ratings is one data set: its items are
    described with the counts of those rows, its histories are these rows, and nothing else in it is
    read. Of any other folder every text, JSON-lines and Parquet file is read.

    Args:
        weight: of every corpus that is found.
        until: Unix seconds; what happened at and after it is left out.

    Raises:
        DataError: names the file and what would be right.
    """
    if not 0 < weight < math.inf:
        raise DataError(f"{path}: should weigh more than 0 and be finite, weighs {weight:g}")
    if path.is_dir():
        rows = next((path / name for name in _ROWS if (path / name).is_file()), None)
        if rows is not None and (path / ITEMS).is_file():
            return [
                _open_items(path / ITEMS, rows, weight=weight, until=until),
                _open_rows(rows, weight=weight, until=until),
            ]
        files = sorted(one for one in path.iterdir() if one.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path}: should hold files that end in {', '.join(_SUFFIXES)}")
        return [_open_file(file, weight=weight, until=until) for file in files]
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder")
    return [_open_file(path, weight=weight, until=until)]


def _open_file(path: Path, *, weight: float, until: float | None) -> Corpus:
    if path.suffix == ".txt":
        return _texts(path, "plain text, a document ends at a blank line", read_text_file, weight)
    if path.suffix == ".jsonl":
        return _texts(path, "JSON lines with a text each", read_json_texts, weight)
    if path.suffix != ".parquet":
        raise DataError(f"{path}: should end in {', '.join(_SUFFIXES)}")
    columns = _columns(path)
    if columns.keys() >= _COMMON_ITEMS or columns.keys() >= _FILMS:
        return _open_items(path, None, weight=weight, until=until)
    if columns.keys() >= _COMMON_EVENTS or columns.keys() >= _FILM_ROWS:
        return _open_rows(path, weight=weight, until=until)
    text = columns.get("text")
    if text is None or not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise DataError(f"{path}: columns: {_WANTED}; are {', '.join(columns)}")
    return _texts(path, "the column text", read_parquet_texts, weight)


def _texts(
    path: Path, description: str, read: Callable[[Path], Iterator[Document]], weight: float
) -> Corpus:
    return Corpus(files=(path,), description=description, read=lambda _: read(path), weight=weight)


def _open_items(path: Path, rows: Path | None, *, weight: float, until: float | None) -> Corpus:
    form = _form_of_items(path)
    count = count_common if form is COMMON else count_movielens
    description = f"{form.kind}s, {pq.read_metadata(path).num_rows:,} rows"
    if untitled := count_untitled(path, form):
        description += f" ({untitled:,} without a title left out)"
    if rows is None:
        return Corpus(
            files=(path,),
            description=f"{description}, without counts of raters",
            read=lambda seed: read_items(path, form, {}, seed=seed),
            weight=weight,
        )
    _check_rows(rows, form)
    counts = count(rows, until=until)
    return Corpus(
        files=(path, rows),
        description=f"{description}, with counts of raters over all of {rows.name}",
        read=lambda seed: read_items(path, form, counts, seed=seed),
        weight=weight,
    )


def _open_rows(path: Path, *, weight: float, until: float | None) -> Corpus:
    items = path.with_name(ITEMS)
    if not items.is_file():
        raise DataError(f"{path}: histories need the titles of {ITEMS} in the same folder")
    form = _form_of_items(items)
    _check_rows(path, form)
    num_rows = pq.read_metadata(path).num_rows
    rows = partial(read_common_rows if form is COMMON else read_movielens_rows, path, until=until)
    unread = count_unread(path, items, form)
    left_out = f" ({unread:,} with a null or without a titled item left out)" if unread else ""
    return Corpus(
        files=(path, items),
        description=f"histories of members, {num_rows:,} rows{left_out}, with titles of {ITEMS}",
        read=lambda seed: read_histories(rows(), items, form, num_rows=num_rows, seed=seed),
        weight=weight,
    )


def _form_of_items(path: Path) -> TableForm:
    columns = _columns(path).keys()
    for form, wanted in ((COMMON, _COMMON_ITEMS), (MOVIELENS, _FILMS)):
        if columns >= wanted:
            return form
    raise DataError(f"{path}: columns: {_WANTED}; are {', '.join(columns)}")


def _check_rows(path: Path, form: TableForm) -> None:
    columns = _columns(path).keys()
    wanted = _COMMON_EVENTS if form is COMMON else _FILM_ROWS
    if missing := ", ".join(sorted(wanted - columns)):
        raise DataError(f"{path}: should have the columns {missing}, as {ITEMS} is of {form.kind}s")
    if form is MOVIELENS and columns.isdisjoint({"rating", "label"}):
        raise DataError(f"{path}: should have a column rating or label")


def _columns(path: Path) -> dict[str, pa.DataType]:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file: {error}") from error
    return dict(zip(schema.names, schema.types, strict=True))


def list_files(corpora: Iterable[Corpus]) -> list[Path]:
    """Return every file of corpora once, in their order."""
    return list(dict.fromkeys(file for corpus in corpora for file in corpus.files))
