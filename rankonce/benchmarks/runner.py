"""Cases, their arms, and the loop that measures them one by one under a deadline.

An arm that raises is recorded with its error and the run goes on: on a borrowed chip one broken
peer must not cost the other numbers.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time
from typing import Any

import torch
from tqdm import tqdm

from rankonce.benchmarks.results import (
    FAILED,
    MEASURED,
    NOT_MEASURED,
    WRONG,
    Row,
    first_line,
    load,
    save,
)
from rankonce.benchmarks.roofline import Ceilings
from rankonce.benchmarks.timing import Deadline, Timing

OUT_OF_TIME = "out of time"


class UnavailableError(Exception):
    """An arm that cannot run here; the message says why."""


class DeviceLostError(Exception):
    """The GPU answers nothing any more in this process."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far values are from those they should equal.

    Attributes:
        max_abs: largest absolute difference.
        error: relative difference, bounded by ``tolerance``.
    """

    max_abs: float
    error: float
    tolerance: float

    @property
    def is_wrong(self) -> bool:
        """Whether the values count as different; NaN always does."""
        return not self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an arm found.

    Attributes:
        timing: ``None`` for values that are wrong.
        flop, num_bytes: useful work of one call.
        ceiling: field of ``Ceilings`` that the rate is compared with.
    """

    timing: Timing | None
    difference: Difference | None = None
    flop: float | None = None
    num_bytes: float | None = None
    ceiling: str | None = None
    details: dict[str, float] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One implementation of a case.

    Attributes:
        measure: takes what the case prepared.
        expected_s: it is not started when less is left.
        limit_s: a supervised run ends it after this time.
        dtype: where it is not the case's.
    """

    name: str
    measure: Callable[[Any], Measurement]
    expected_s: float = 5.0
    limit_s: float = 60.0
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arms on one workload.

    Attributes:
        priority: smaller runs earlier, whatever the suite.
        prepare: makes what the arms share; let go of after the last one.
        prepare_s: how long that takes.
    """

    suite: str
    operation: str
    direction: str
    shape: str
    subject: str
    dtype: str
    priority: int
    prepare: Callable[[], Any]
    arms: tuple[Arm, ...]
    prepare_s: float = 1.0

    def row(self, arm: Arm, device: str) -> Row:
        """Make the row of an arm that has not run."""
        return Row(
            suite=self.suite,
            operation=self.operation,
            direction=self.direction,
            shape=self.shape,
            subject=self.subject,
            arm=arm.name,
            device=device,
            dtype=arm.dtype or self.dtype,
            status=NOT_MEASURED,
        )


class Run:
    """The rows of one run and their file.

    Args:
        path: holds the environment; rewritten after every arm. Rows that it holds already are
            kept and not run again.
    """

    def __init__(self, path: Path, *, deadline: Deadline, device: str) -> None:
        self.path = path
        self.results = load(path)
        self.deadline = deadline
        self.device = device

    @property
    def ceilings(self) -> Ceilings:
        """The ceilings, which are measured before any arm."""
        assert self.results.ceilings is not None
        return self.results.ceilings

    def set_ceilings(self, ceilings: Ceilings) -> None:
        """Take up the ceilings and write the file."""
        self.results = replace(self.results, ceilings=ceilings)
        save(self.path, self.results)

    def record(self, row: Row) -> None:
        """Add a row and write the file."""
        self.results = replace(self.results, rows=(*self.results.rows, row), started=None)
        save(self.path, self.results)

    def start(self, row: Row, limit_s: float) -> None:
        """Write down what runs now, for whoever finds this process dead or stuck."""
        started = {"row": row.__dict__, "until": time() + limit_s}
        self.results = replace(self.results, started=started)
        save(self.path, self.results)

    def run(self, cases: Iterable[Case]) -> None:
        """Measure the cases in the order of their priority.

        Raises:
            DeviceLostError: an arm took the GPU down; its row is recorded.
        """
        done = {row.key for row in self.results.rows}
        ordered = sorted(cases, key=lambda case: case.priority)
        total = sum(len(case.arms) for case in ordered)
        # Whatever is loaded by now stays: the collections between arms need not look at it.
        gc.freeze()
        bar = tqdm(total=total, unit="arm", file=sys.stderr, disable=None, dynamic_ncols=True)
        try:
            with bar:
                for case in ordered:
                    pending = [a for a in case.arms if case.row(a, self.device).key not in done]
                    bar.update(len(case.arms) - len(pending))
                    self._run_case(case, pending, bar)
        finally:
            gc.unfreeze()

    def _run_case(self, case: Case, arms: Sequence[Arm], bar: Any) -> None:
        shared: list[Any] = []
        for arm in arms:
            row = case.row(arm, self.device)
            bar.set_postfix_str(row.key, refresh=True)
            prepare_s = 0.0 if shared else case.prepare_s
            if self.deadline.left_s < arm.expected_s + prepare_s:
                row = replace(row, reason=OUT_OF_TIME)
            else:
                limit_s = min(arm.limit_s, self.deadline.left_s) + prepare_s
                self.start(row, limit_s)
                row = self._measure(case, arm, shared, row)
            self.record(row)
            bar.update()
            if row.reason != OUT_OF_TIME:
                tqdm.write(describe(row), file=sys.stderr)
            gc.collect()
            if row.status == FAILED:
                release()
                check_device(self.device)
        shared.clear()
        release()

    def _measure(self, case: Case, arm: Arm, shared: list[Any], row: Row) -> Row:
        try:
            if not shared:
                shared.append(case.prepare())
            measurement = arm.measure(shared[0])
        except UnavailableError as error:
            return replace(row, reason=str(error))
        except Exception as error:  # whatever a peer raises is a result
            return replace(row, status=FAILED, reason=error_text(error))
        return fill_row(row, measurement, self.ceilings)


def fill_row(row: Row, measurement: Measurement, ceilings: Ceilings) -> Row:
    """Put the numbers of an arm into its row."""
    difference, timing = measurement.difference, measurement.timing
    row = replace(row, details=measurement.details, note=measurement.note)
    if difference is not None:
        row = replace(
            row,
            max_abs_difference=_finite(difference.max_abs),
            error=_finite(difference.error),
            tolerance=difference.tolerance,
        )
    if timing is None:
        assert difference is not None
        reason = f"differs by {difference.error:.2g}, more than {difference.tolerance:.2g}"
        return replace(row, status=WRONG, reason=reason)
    row = replace(row, status=MEASURED, **timing.__dict__)
    best_ms = row.best_ms or math.inf
    if measurement.flop is not None:
        row = replace(row, tflops=measurement.flop / best_ms / 1e9)
    if measurement.num_bytes is not None:
        row = replace(row, tb_s=measurement.num_bytes / best_ms / 1e9)
    if measurement.ceiling is not None:
        ceiling = getattr(ceilings, measurement.ceiling)
        rate = row.tb_s if measurement.ceiling == "copy_tb_s" else row.tflops
        if ceiling is not None and rate is not None:
            row = replace(row, ratio=rate / ceiling, ceiling=measurement.ceiling)
    return row


def describe(row: Row) -> str:
    """Write a row as one line."""
    if row.status != MEASURED:
        return f"{row.key}: {row.status}: {first_line(row.reason)[:160]}"
    parts = [f"{row.best_ms:.4g} ms"]
    if row.tflops is not None:
        parts.append(f"{row.tflops:.3g} TFLOP/s")
    if row.ratio is not None:
        parts.append(f"{100 * row.ratio:.3g} % of {row.ceiling}")
    return f"{row.key}: {', '.join(parts)}"


def error_text(error: BaseException) -> str:
    """Write an error in at most a thousand characters."""
    return f"{type(error).__name__}: {str(error).strip()}"[:1000]


def release() -> None:
    """Give memory back, so that an arm does not fail for what another one held."""
    gc.collect()
    if torch.cuda.is_available():
        # After a fault on the device this fails as everything does; check_device tells.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def check_device(device: str) -> None:
    """Make sure that the device still computes.

    Raises:
        DeviceLostError: it does not.
    """
    try:
        float(torch.ones(2, device=device).sum())
    except RuntimeError as error:
        raise DeviceLostError(error_text(error)) from error


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
