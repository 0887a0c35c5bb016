"""A run keeps what it has measured, whatever its arms do, and ends in time."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankonce.benchmarks import runner, supervision
from rankonce.benchmarks.results import FAILED, MEASURED, NOT_MEASURED, WRONG, Results, load, save
from rankonce.benchmarks.roofline import Ceilings
from rankonce.benchmarks.runner import (
    Arm,
    Case,
    DeviceLostError,
    Difference,
    Measurement,
    Run,
    UnavailableError,
)
from rankonce.benchmarks.timing import Deadline, Timing
from rankonce.errors import DataError

CEILINGS = Ceilings(matmul_tflops=100.0, fp8_tflops=200.0, copy_tb_s=2.0)
TIMING = Timing(median_ms=2.0, p20_ms=1.0, p80_ms=3.0, device_ms=1.0)


def case_of(
    arms: dict[str, Callable[[Any], Measurement]], *, priority: int = 0, name: str = "operation"
) -> Case:
    return Case(
        suite="kernels",
        operation=name,
        direction="forward",
        shape="P=1 N=1 L=1",
        subject="D=1",
        dtype="float32",
        priority=priority,
        prepare=dict,
        prepare_s=0.0,
        arms=tuple(Arm(name=key, measure=call, expected_s=10.0) for key, call in arms.items()),
    )


def run_of(path: Path, *, seconds: float = 1e6, clock: Callable[[], float] = time.monotonic) -> Run:
    if not path.exists():
        save(path, Results(environment={"chip": "test"}, ceilings=CEILINGS))
    return Run(path, deadline=Deadline(seconds, clock=clock), device="cpu")


def measured(_: Any) -> Measurement:
    return Measurement(timing=TIMING, flop=5e10, ceiling="matmul_tflops")


def test_rates_and_ratios_come_from_the_time_without_launch_gaps(tmp_path: Path) -> None:
    def copying(_: Any) -> Measurement:
        return Measurement(timing=TIMING, num_bytes=1e9, ceiling="copy_tb_s")

    run_of(tmp_path / "r.json").run([case_of({"flop": measured, "bytes": copying})])
    by_flop, by_bytes = load(tmp_path / "r.json").rows
    assert (by_flop.tflops, by_flop.ratio, by_flop.median_ms) == (50.0, 0.5, 2.0)
    assert (by_bytes.tb_s, by_bytes.ratio) == (1.0, 0.5)


def test_an_arm_that_raises_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    def failing(_: Any) -> Measurement:
        raise RuntimeError("no kernel image")

    def absent(_: Any) -> Measurement:
        raise UnavailableError("liger_kernel is not installed")

    def wrong(_: Any) -> Measurement:
        difference = Difference(max_abs=9.0, error=1.4, tolerance=0.01)
        return Measurement(timing=None, difference=difference)

    arms = {"failing": failing, "absent": absent, "wrong": wrong, "measured": measured}
    run_of(tmp_path / "r.json").run([case_of(arms)])
    rows = {row.arm: row for row in load(tmp_path / "r.json").rows}
    assert [row.status for row in rows.values()] == [FAILED, NOT_MEASURED, WRONG, MEASURED]
    assert rows["failing"].reason == "RuntimeError: no kernel image"
    assert rows["absent"].reason == "liger_kernel is not installed"
    assert rows["wrong"].median_ms is None
    assert rows["wrong"].max_abs_difference == 9.0


def test_arms_that_no_longer_fit_are_recorded_as_out_of_time(tmp_path: Path) -> None:
    now = 0.0

    def slow(_: Any) -> Measurement:
        nonlocal now
        now += 12.0
        return measured(_)

    run = run_of(tmp_path / "r.json", seconds=30.0, clock=lambda: now)
    run.run([case_of({"a": slow, "b": slow, "c": slow}), case_of({"d": slow}, name="late")])
    rows = load(tmp_path / "r.json").rows
    assert [row.status for row in rows] == [MEASURED, MEASURED, NOT_MEASURED, NOT_MEASURED]
    assert {row.reason for row in rows[2:]} == {"out of time"}
    assert now <= 30.0


def test_cases_run_by_priority_and_the_file_is_written_after_every_arm(tmp_path: Path) -> None:
    path, seen = tmp_path / "r.json", []

    def looking(_: Any) -> Measurement:
        record = json.loads(path.read_text())
        seen.append((record["started"]["row"]["operation"], len(record["rows"])))
        return measured(_)

    cases = [
        case_of({"x": looking}, priority=2, name="late"),
        case_of({"x": looking, "y": looking}),
    ]
    run_of(path).run(cases)
    assert seen == [("operation", 0), ("operation", 1), ("late", 2)]
    assert load(path).started is None


def test_a_run_that_goes_on_does_not_repeat_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run_of(path).run([case_of({"a": measured})])

    def never(_: Any) -> Measurement:
        raise AssertionError("measured again")

    run_of(path).run([case_of({"a": never, "b": measured})])
    assert [(row.arm, row.status) for row in load(path).rows] == [("a", MEASURED), ("b", MEASURED)]


def test_a_lost_device_ends_the_process_with_the_arm_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(_: Any) -> Measurement:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(device: str) -> None:
        raise DeviceLostError(device)

    monkeypatch.setattr(runner, "check_device", lost)
    with pytest.raises(DeviceLostError):
        run_of(tmp_path / "r.json").run([case_of({"a": fault, "b": measured})])
    (row,) = load(tmp_path / "r.json").rows
    assert (row.arm, row.status) == ("a", FAILED)


# Plays a benchmark: dies in its first life, hangs in its second, ends well in its third.
CHILD = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
from rankonce.benchmarks.results import Results, Row, load, save
from rankonce.benchmarks.supervision import announce
path = Path(sys.argv[sys.argv.index("--path") + 1])
if not path.exists():
    save(path, Results(environment={"chip": "test"}))
print("noise of a library", flush=True)
announce(path, Path(sys.argv[sys.argv.index("--announce") + 1]))
life = len(load(path).rows)
assert (life > 0) == ("--resume" in sys.argv)
row = Row(suite="kernels", operation="o", direction="forward", shape="s", subject="s",
          arm=f"arm {life}", device="cpu", dtype="float32", status="not measured")
if life < 2:
    until = time.time() + (0 if life else 100)
    save(path, replace(load(path), started={"row": row.__dict__, "until": until}))
    if life:
        time.sleep(100)
    os._exit(139)
save(path, replace(load(path), rows=(*load(path).rows, row)))
"""


def test_a_child_that_dies_or_hangs_is_replaced_and_its_arm_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervision, "_GRACE_S", 0.1)
    path = tmp_path / "r.json"
    arguments = [sys.executable, "-c", CHILD, "--path", str(path)]
    found = supervision.supervise(arguments, until=time.time() + 100, poll_s=0.1)
    assert found == path
    assert "noise" not in (captured := capfd.readouterr()).out
    rows = load(path).rows
    assert [row.status for row in rows] == [FAILED, FAILED, NOT_MEASURED]
    assert rows[0].reason == "the process ended with status 139"
    assert rows[1].reason == "the arm did not end in its time"
    assert "going on in a new process" in captured.err


def test_a_child_that_cannot_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="did not start: status 3"):
        supervision.supervise(
            [sys.executable, "-c", "raise SystemExit(3)"], until=time.time() + 100
        )
