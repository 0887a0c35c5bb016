"""The record of a run: environment, ceilings and rows, rewritten after every arm."""

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankonce.benchmarks.records import write_record
from rankonce.benchmarks.roofline import Ceilings
from rankonce.errors import DataError

MEASURED, WRONG, FAILED, NOT_MEASURED = "measured", "wrong", "failed", "not measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one shape.

    Attributes:
        suite: ``kernels`` or ``pass``.
        operation: what is computed; ``direction`` is ``forward`` or ``backward``.
        shape: of the pass; ``subject``: the heads, sizes or model.
        arm: who computes it.
        status: ``measured``, ``wrong`` (values differ, not timed), ``failed`` or ``not measured``.
        reason: for every status but ``measured``.
        device_ms: with the launches queued ahead, see ``timing``.
        tflops, tb_s: useful FLOP and bytes a second, by ``device_ms`` where it is known.
        ratio: of the ceiling named in ``ceiling``; for a pass its limit over its time.
        max_abs_difference: largest difference from the arm that it is compared with.
        error: the difference that ``tolerance`` bounds.
        details: other numbers, with units in their names.
        note: what a reader should know of how the number came about.
    """

    suite: str
    operation: str
    direction: str
    shape: str
    subject: str
    arm: str
    device: str
    dtype: str
    status: str
    reason: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    device_ms: float | None = None
    num_runs: int | None = None
    tflops: float | None = None
    tb_s: float | None = None
    ratio: float | None = None
    ceiling: str | None = None
    max_abs_difference: float | None = None
    error: float | None = None
    tolerance: float | None = None
    details: dict[str, float] = field(default_factory=dict)
    note: str | None = None

    @property
    def key(self) -> str:
        """What tells the row from all others of a run."""
        parts = (self.suite, self.operation, self.direction, self.shape, self.subject, self.arm)
        return " | ".join(parts)

    @property
    def best_ms(self) -> float | None:
        """The time without launch gaps where it is known, else the median."""
        return self.median_ms if self.device_ms is None else self.device_ms


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a file of results holds.

    Attributes:
        environment: commit, chip, libraries.
        started: the arm that runs now: its row without numbers, and until when it may run.
    """

    environment: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: tuple[Row, ...] = ()
    started: dict[str, Any] | None = None

    @property
    def chip(self) -> str:
        """Slug of the chip."""
        return str(self.environment["chip"])


def chip_slug(device_name: str) -> str:
    """Make a folder name of a device's name: ``NVIDIA H200`` becomes ``h200``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return slug.removeprefix("nvidia-") or "unknown"


def choose_path(folder: Path, chip: str, commit: str) -> Path:
    """Name the file of a new run; an older one is never overwritten."""
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{re.sub(r'[^A-Za-z0-9_.]+', '-', commit)}"
    path, number = folder / chip / f"{stem}.json", 2
    while path.exists():
        path, number = path.with_name(f"{stem}-{number}.json"), number + 1
    return path


def save(path: Path, results: Results) -> None:
    """Write the file so that a kill leaves the old one or the new one."""
    record = asdict(results)
    record["rows"] = [
        {name: value for name, value in row.items() if value is not None and value != {}}
        for row in record["rows"]
    ]
    write_record(path, record)


def load(path: Path) -> Results:
    """Read a file of results.

    Raises:
        DataError: it is not one.
    """
    try:
        record = json.loads(path.read_text())
        ceilings = record["ceilings"]
        return Results(
            environment=record["environment"],
            ceilings=None if ceilings is None else Ceilings(**ceilings),
            rows=tuple(Row(**row) for row in record["rows"]),
            started=record["started"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a file of benchmark results: {error}") from error


def first_line(text: str | None) -> str:
    """Return the first line of a reason, for tables."""
    return (text or "").strip().partition("\n")[0]
