"""A child process that measures, replaced when an arm kills it or does not end.

A kernel with a fault takes its whole process's GPU context with it. The results file says which arm
ran, so the next child goes on behind it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankonce.benchmarks.results import FAILED, Row, load, save
from rankonce.errors import DataError

# Exit status of a child whose GPU answers no more.
DEVICE_LOST = 75
# What a stuck arm gets on top of its limit, and a child to start and to end.
_GRACE_S = 15.0
_MAX_CHILDREN = 12


def supervise(arguments: Sequence[str], *, until: float, poll_s: float = 1.0) -> Path:
    """Run a child until it ends well, however often it has to be replaced.

    Args:
        arguments: of the first child; the next ones also get ``--resume PATH``.
            Each gets ``--announce FILE``, into which it writes the path of its results.
        until: time of day at which the run should have ended.

    Returns:
        The path of the results.

    Raises:
        DataError: a child ends before it names its results or without a new row.
    """
    path: Path | None = None
    num_rows = 0
    for _ in range(_MAX_CHILDREN):
        resume = [] if path is None else ["--resume", str(path)]
        with tempfile.TemporaryDirectory() as folder:
            named = Path(folder) / "path"
            command = [*arguments, "--announce", str(named), *resume]
            # Stdout is ours; what libraries print there is no loss.
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                path = _wait_for_path(child, named, poll_s) or path
                if path is None:
                    raise DataError(f"the benchmark did not start: status {child.wait()}")
                reason = _watch(child, path, until=until, poll_s=poll_s)
            finally:
                child.kill()
                child.wait()
        if reason is None:
            return path
        print(f"{reason}; going on in a new process", file=sys.stderr)
        record_lost(path, reason)
        if time.time() >= until:
            break
        if len(load(path).rows) == num_rows:
            raise DataError(f"the benchmark ended without a new row: {reason}")
        num_rows = len(load(path).rows)
    assert path is not None
    return path


def announce(path: Path, named: Path) -> None:
    """Tell the parent where the results are."""
    draft = named.with_suffix(".part")
    draft.write_text(str(path.absolute()))
    os.replace(draft, named)


def _wait_for_path(child: "subprocess.Popen[bytes]", named: Path, poll_s: float) -> Path | None:
    while not named.exists():
        try:
            child.wait(timeout=poll_s)
        except subprocess.TimeoutExpired:
            continue
        break
    return Path(named.read_text()) if named.exists() else None


def _watch(
    child: "subprocess.Popen[bytes]", path: Path, *, until: float, poll_s: float
) -> str | None:
    """Wait for the child; why it was lost, or ``None`` when it ended well."""
    while True:
        try:
            status = child.wait(timeout=poll_s)
        except subprocess.TimeoutExpired:
            started = load(path).started
            end = until + 2 * _GRACE_S if started is None else float(started["until"]) + _GRACE_S
            if time.time() < end:
                continue
            child.kill()
            return "the arm did not end in its time"
        if status == 0:
            return None
        if status == DEVICE_LOST:
            return "the GPU answered no more after the arm"
        return f"the process ended with status {status}"


def record_lost(path: Path, reason: str) -> None:
    """Write down that the arm that ran has failed."""
    results = load(path)
    if results.started is None:
        return
    row = replace(Row(**results.started["row"]), status=FAILED, reason=reason)
    save(path, replace(results, rows=(*results.rows, row), started=None))
