"""Scores of teachers in one SQLite file: asked for once, read by every student.

A score is kept under what it depends on: the teacher, the task's definition, what the request says
beside its candidates, and the candidate. By the house law nothing else changes it, so that a
candidate is found again in another list of candidates. Two things make a history depend on the
whole list: the policy ``similar``, whose scores are kept under it, and a context so full that the
longest candidate decides how much history fits; such a score is that of the list that came first.
"""

import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

from rankonce import __version__
from rankonce.errors import DataError
from rankonce.prompts.tasks import Task
from rankonce.records import Item, ScoreRequest

_VERSION = 1
# Marks the file as ours: "RKDS".
_APPLICATION = 0x524B4453
_TABLES = """
CREATE TABLE teachers (
    fingerprint TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    served TEXT,
    num_calls INTEGER NOT NULL DEFAULT 0,
    num_candidates INTEGER NOT NULL DEFAULT 0,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    seconds REAL NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE tasks (
    fingerprint TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    labels TEXT NOT NULL
) STRICT;
CREATE TABLE scores (
    key BLOB PRIMARY KEY,
    teacher TEXT NOT NULL,
    task TEXT NOT NULL,
    log_probs BLOB NOT NULL
) STRICT, WITHOUT ROWID;
"""
# How long another writer is waited for.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Cost:
    """What asking teachers took.

    Attributes:
        num_calls: requests that a teacher was sent.
        num_candidates: scores that it gave.
        num_tokens: that went through it.
        seconds: until its answers were here.
    """

    num_calls: int = 0
    num_candidates: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: value + asdict(other)[name] for name, value in asdict(self).items()})


def fingerprint_task(task: Task) -> str:
    """Identify what a task asks: its definition without description and other wordings."""
    text = task.model_dump_json(
        exclude={"description": True, "styles": True, "ranking": {"wanted"}}
    )
    return hashlib.sha256(text.encode()).hexdigest()


def score_keys(teacher: str, task: Task, request: ScoreRequest) -> list[bytes]:
    """Return the key of every candidate's score.

    Args:
        teacher: its fingerprint.
    """
    candidates = [_canonical(_nameless(one)) for one in request.candidates]
    shared = replace(
        request,
        id=None,
        candidates=(),
        history=tuple(replace(one, item=_nameless(one.item)) for one in request.history),
        examples=tuple(replace(one, item=_nameless(one.item)) for one in request.examples),
    )
    # Another version may write the same request in other words.
    parts = [__version__, teacher, fingerprint_task(task), _canonical(shared)]
    if task.history is not None and task.history.policy == "similar":
        parts += candidates
    head = hashlib.sha256("\0".join(parts).encode()).digest()
    return [hashlib.sha256(head + one.encode()).digest() for one in candidates]


class ScoreStore:
    """Log-probabilities of labels by teacher, task, request and candidate.

    What is written is on disk when the call returns: a killed process loses no more than what it
    had not written. While nobody writes the store is one file, which can be copied.

    Args:
        path: made where it is missing, with its folders.

    Raises:
        DataError: it is no store, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE_S)
            self._set_up()
        except sqlite3.Error as error:
            raise DataError(
                f"store: {path} cannot be used as a store of scores: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def read(self, task: Task, keys: Sequence[bytes]) -> list[dict[str, float] | None]:
        """Return the scores of keys, log P(label) by name; ``None`` where there is none."""
        find = "SELECT log_probs FROM scores WHERE key = ?"
        found = [self._connection.execute(find, (key,)).fetchone() for key in keys]
        shape = f"<{len(task.labels)}d"
        return [
            row and dict(zip(task.label_names, struct.unpack(shape, row[0]), strict=True))
            for row in found
        ]

    def write(
        self, teacher: str, task: Task, scores: Mapping[bytes, Mapping[str, float]], cost: Cost
    ) -> None:
        """Keep the scores of one task, and add what they took; whole or not at all.

        Args:
            teacher: the fingerprint of one that was registered.
            scores: log P(label) by name, of every key.
        """
        fingerprint, shape = fingerprint_task(task), f"<{len(task.labels)}d"
        rows = [
            (key, teacher, fingerprint, struct.pack(shape, *(one[n] for n in task.label_names)))
            for key, one in scores.items()
        ]
        columns = [field.name for field in fields(Cost)]
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?)",
                (fingerprint, task.name, json.dumps(task.label_names)),
            )
            connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)
            connection.execute(
                f"UPDATE teachers SET {', '.join(f'{c} = {c} + :{c}' for c in columns)} "
                "WHERE fingerprint = :fingerprint",
                {**asdict(cost), "fingerprint": teacher},
            )

    def register(self, teacher: str, *, name: str, served: str | None = None) -> None:
        """Note a teacher, before its first scores.

        Args:
            served: what its server says of it, where it has one.

        Raises:
            DataError: the server said something else when the scores that are here came.
        """
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO teachers (fingerprint, name, served) VALUES (?, ?, ?)",
                (teacher, name, served),
            )
            (before,) = connection.execute(
                "SELECT served FROM teachers WHERE fingerprint = ?", (teacher,)
            ).fetchone()
        if before != served:
            raise DataError(
                f"store: {self.path} holds scores of {name} when it served {before}; it now serves "
                f"{served}: name a new store for these"
            )

    def cost(self, teacher: str) -> Cost:
        """Return what all scores of a teacher that are here took, in all runs together."""
        columns = ", ".join(field.name for field in fields(Cost))
        row = self._connection.execute(
            f"SELECT {columns} FROM teachers WHERE fingerprint = ?", (teacher,)
        ).fetchone()
        return Cost(*row) if row else Cost()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM scores").fetchone()[0])

    def _set_up(self) -> None:
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            is_new = num_tables == 0
            if is_new:
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        if is_new or (application, version) == (_APPLICATION, _VERSION):
            return
        self.close()
        if application != _APPLICATION:
            raise DataError(f"store: {self.path} is a database of something else; name a new file")
        raise DataError(
            f"store: {self.path} should have version {_VERSION}, has {version}; another RankOnce "
            "wrote it: name a new file"
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _nameless(item: Item) -> Item:
    """Leave out the caller's own name for an item, which no prompt holds."""
    return replace(item, id=None)


def _canonical(record: ScoreRequest | Item) -> str:
    return json.dumps(_plain(record), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
