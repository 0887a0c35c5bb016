"""The form that all datasets are brought to: tables in Parquet and a manifest beside them.

    items.parquet       item, title, text, categories, brand (or author, or publisher), year
    events.parquet      member, item, action, value, time, impression, position
    queries.parquet     query, text, locale, category
    judgements.parquet  query, item, grade (4 = complete answer ... 0 = irrelevant), label (the
                        source's own word), split
    tags.parquet        member, item, tag, time
    manifest.json       source, licence, files and tables with rows and SHA-256, adapter's version

Ids are texts. ``time`` is in Unix seconds, or counts rows where the manifest's ``clock`` says so;
it is null for what happened before all dated events of the member. ``impression`` names the list
that the item was shown in and ``position`` its place there, from 1. A member's events stand
together, in the order of time, in one row group.

Events are sorted through files on disk: no more than a 64th part of the members is in memory.
"""

import json
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rankonce import __version__
from rankonce.datasets.download import RemoteFile, sha256_of
from rankonce.errors import DataError

MANIFEST = "manifest.json"
_FORMAT = 1
_MANIFEST_KEYS = {"dataset", "tasks", "adapter_version", "clock", "impressions", "dropped"}
_NUM_BUCKETS = 64
# Tables that are small enough for memory, with what tells their rows apart.
_KEYS = {
    "queries": ["query"],
    "judgements": ["query", "item"],
    "tags": ["member", "item", "tag", "time"],
}
_TEXT = pa.large_string()
SCHEMAS = {
    "items": pa.schema(
        [
            ("item", _TEXT),
            ("title", _TEXT),
            ("text", _TEXT),
            ("categories", pa.large_list(_TEXT)),
            ("brand", _TEXT),
            ("year", pa.int32()),
        ]
    ),
    "events": pa.schema(
        [
            ("member", _TEXT),
            ("item", _TEXT),
            ("action", _TEXT),
            ("value", pa.float64()),
            ("time", pa.int64()),
            ("impression", _TEXT),
            ("position", pa.int32()),
        ]
    ),
    "queries": pa.schema(
        [("query", _TEXT), ("text", _TEXT), ("locale", _TEXT), ("category", _TEXT)]
    ),
    "judgements": pa.schema(
        [
            ("query", _TEXT),
            ("item", _TEXT),
            ("grade", pa.int8()),
            ("label", _TEXT),
            ("split", _TEXT),
        ]
    ),
    "tags": pa.schema([("member", _TEXT), ("item", _TEXT), ("tag", _TEXT), ("time", pa.int64())]),
}


class SourceFiles:
    """The files of a source, found by name wherever they lie."""

    def __init__(self, paths: Sequence[Path], where: str) -> None:
        self.paths = tuple(sorted(paths))
        self._where = where

    def all(self, pattern: str) -> list[Path]:
        """Return the files whose names match, at least one.

        Raises:
            DataError: there is none.
        """
        if found := self.maybe(pattern):
            return found
        raise DataError(f"{self._where}: should hold a file {pattern}")

    def maybe(self, pattern: str) -> list[Path]:
        """Return the files whose names match, maybe none."""
        return [path for path in self.paths if fnmatch(path.name, pattern)]

    def one(self, pattern: str) -> Path:
        """Return the only file whose name matches.

        Raises:
            DataError: there is none, or there are several.
        """
        found = self.all(pattern)
        if len(found) > 1:
            several = ", ".join(map(str, found[:3]))
            raise DataError(f"{self._where}: should hold one file {pattern}, holds {several}")
        return found[0]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How a public dataset becomes the common form.

    Attributes:
        name: as ``rankonce datasets`` takes it.
        domain: what is ranked.
        size: in words.
        licence: in short; what its terms ask for.
        page: where it is described.
        files: to download.
        parts: patterns of the names of the files that ``convert`` reads, in archives or loose.
        tasks: names of the library's tasks that it serves.
        version: of the conversion; changes when its output does.
        convert: reads the files and adds rows to the tables.
        clock: what ``time`` counts.
        has_impressions: whether events tell what was shown together.
    """

    name: str
    domain: str
    size: str
    licence: str
    page: str
    files: tuple[RemoteFile, ...]
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    version: int
    convert: "Callable[[SourceFiles, TableWriter], None]"
    clock: Literal["seconds", "rows"] = "seconds"
    has_impressions: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A folder in the common form."""

    folder: Path
    manifest: Mapping[str, Any]
    tables: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the source."""
        return str(self.manifest["dataset"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The library's tasks that it serves."""
        return tuple(self.manifest["tasks"])

    @property
    def has_impressions(self) -> bool:
        """Whether events tell what else was shown."""
        return bool(self.manifest["impressions"])

    def read(self, table: str) -> pl.LazyFrame:
        """Scan a table.

        Raises:
            DataError: the dataset does not have it.
        """
        if table not in self.tables:
            raise DataError(f"{self.folder}: {self.name} has no {table}")
        return pl.scan_parquet(self.tables[table])


def open_dataset(folder: Path, *, verify: bool = False) -> Dataset:
    """Open a folder that ``rankonce datasets`` made.

    Args:
        verify: also compare the SHA-256 of every table.

    Raises:
        DataError: there is no manifest, a table is missing, or one has changed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise DataError(f"{path}: format: should be {_FORMAT}, is {manifest['format']}")
        tables = {name: folder / f"{name}.parquet" for name in manifest["tables"]}
        digests = {name: table["sha256"] for name, table in manifest["tables"].items()}
        if missing := _MANIFEST_KEYS - set(manifest):
            raise DataError(f"{path}: should have {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: should be the manifest of a dataset: {error}") from error
    for name, table in tables.items():
        if not table.exists():
            raise DataError(f"{table}: is missing; prepare the dataset again")
        if verify and sha256_of(table) != digests[name]:
            raise DataError(f"{table}: has changed since it was made; prepare the dataset again")
    return Dataset(folder=folder, manifest=manifest, tables=tables)


class TableWriter:
    """Writes the tables of one dataset, batch by batch.

    Attributes:
        dropped: rows that were left out, by the reason.
        num_unknown: events whose item has no row in items. They stay in the table; requests
            leave them out, as nothing can be said of the item.
    """

    def __init__(self, folder: Path, *, clock: str = "seconds") -> None:
        self.num_unknown = 0
        self.dropped: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self._folder = folder
        self._clock = clock
        self._known_items: set[str] = set()
        self._items: pq.ParquetWriter | None = None
        self._small: dict[str, list[pl.DataFrame]] = {name: [] for name in _KEYS}
        self._spill = tempfile.TemporaryDirectory(dir=folder, prefix=".events-")
        self._buckets: dict[int, pa.RecordBatchFileWriter] = {}
        self._num_events = 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in (self._items, *self._buckets.values()):
            if writer is not None:
                writer.close()
        self._spill.cleanup()

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rows that are left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add_items(self, frame: pl.DataFrame) -> None:
        """Add items; of several with one id the first stays."""
        new = frame.unique("item", keep="first", maintain_order=True)
        if self._known_items:
            new = new.filter([item not in self._known_items for item in new["item"].to_list()])
        self.drop("repeated items", frame.height - new.height)
        self._known_items.update(new["item"].to_list())
        if self._items is None:
            self._items = pq.ParquetWriter(
                self._folder / "items.parquet", SCHEMAS["items"], compression="zstd"
            )
        if new.height:
            self._items.write_table(_shape(new, "items"))
        self.rows["items"] = self.rows.get("items", 0) + new.height

    def add_queries(self, frame: pl.DataFrame) -> None:
        """Add queries; of several with one id the first stays."""
        self._small["queries"].append(frame)

    def add_judgements(self, frame: pl.DataFrame) -> None:
        """Add judgements; of several of one pair the first stays."""
        self._small["judgements"].append(frame)

    def add_tags(self, frame: pl.DataFrame) -> None:
        """Add what members called items; of several that are the same the first stays."""
        self._small["tags"].append(frame)

    def add_events(self, frame: pl.DataFrame) -> None:
        """Add events in any order."""
        if not frame.height:
            return
        members = frame["member"].unique().to_list()
        bucket_of = pl.DataFrame(
            {"member": members, "bucket": [zlib.crc32(m.encode()) % _NUM_BUCKETS for m in members]}
        )
        table = _shape(frame, "events")
        order = pa.array(range(self._num_events, self._num_events + frame.height), pa.int64())
        self._num_events += frame.height
        ordered = pl.DataFrame(pl.from_arrow(table.append_column("order", order)))
        parts = ordered.join(bucket_of, on="member", maintain_order="left").partition_by(
            "bucket", as_dict=True, include_key=False
        )
        for (bucket,), part in parts.items():
            rows = part.to_arrow().cast(_SPILL_SCHEMA)
            if bucket not in self._buckets:
                path = Path(self._spill.name) / f"{bucket}.arrow"
                self._buckets[bucket] = pa.ipc.new_file(
                    path, _SPILL_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")
                )
            self._buckets[bucket].write_table(rows)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write what is left and describe the tables: rows and SHA-256 by name.

        Raises:
            DataError: a dataset without items, or with neither events nor judgements.
        """
        for name, keys in _KEYS.items():
            if frames := self._small[name]:
                whole = pl.concat(frames, how="diagonal_relaxed")
                new = whole.unique(keys, keep="first", maintain_order=True)
                self.drop(f"repeated {name}", whole.height - new.height)
                self.rows[name] = new.height
                pq.write_table(
                    _shape(new, name), self._folder / f"{name}.parquet", compression="zstd"
                )
        if self._items is not None:
            self._items.close()
        if self._buckets:
            self._write_events()
        if not self.rows.get("items") or not (
            self.rows.get("events") or self.rows.get("judgements")
        ):
            raise DataError(f"the files hold no rows of a dataset: {self.rows}")
        return {
            name: {"rows": rows, "sha256": sha256_of(self._folder / f"{name}.parquet")}
            for name, rows in self.rows.items()
        }

    def _write_events(self) -> None:
        schema = SCHEMAS["events"]
        keys = [name for name in schema.names if self._clock == "seconds" or name != "time"]
        rows = unknown = 0
        items = pl.Series(list(self._known_items), dtype=pl.String)
        with pq.ParquetWriter(self._folder / "events.parquet", schema, compression="zstd") as whole:
            for bucket in sorted(self._buckets):
                self._buckets[bucket].close()
                path = Path(self._spill.name) / f"{bucket}.arrow"
                part = pl.read_ipc(path).sort("member", "time", "order", nulls_last=False)
                new = part.unique(keys, keep="first", maintain_order=True)
                self.drop("repeated events", part.height - new.height)
                rows += new.height
                unknown += new.height - int(new["item"].is_in(items.implode()).sum())
                whole.write_table(_shape(new, "events"), row_group_size=max(1, new.height))
                path.unlink()
        self._buckets = {}
        self.rows["events"] = rows
        self.num_unknown = unknown


_SPILL_SCHEMA = SCHEMAS["events"].append(pa.field("order", pa.int64()))


def _shape(frame: pl.DataFrame, name: str) -> pa.Table:
    """Bring a frame into the table's schema; columns that it lacks are null."""
    schema = SCHEMAS[name]
    missing = [column for column in schema.names if column not in frame.columns]
    whole = frame.with_columns(**{column: pl.lit(None) for column in missing})
    return whole.select(schema.names).to_arrow().cast(schema)


def write_manifest(
    folder: Path,
    adapter: Adapter,
    *,
    files: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Any],
    writer: TableWriter,
) -> dict[str, Any]:
    """Write what a dataset was made from and what came out.

    Args:
        files: name, bytes and SHA-256 of each file that was read.
        tables: what ``TableWriter.finish`` returned.
    """
    manifest = {
        "format": _FORMAT,
        "dataset": adapter.name,
        "tasks": list(adapter.tasks),
        "adapter_version": adapter.version,
        "rankonce": __version__,
        "source": {
            "page": adapter.page,
            "licence": adapter.licence,
            "addresses": {file.name: list(file.addresses) for file in adapter.files},
            "files": list(files),
        },
        "clock": adapter.clock,
        "impressions": adapter.has_impressions,
        "tables": dict(tables),
        "dropped": dict(sorted(writer.dropped.items())),
        "events_of_unknown_items": writer.num_unknown,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    return manifest
