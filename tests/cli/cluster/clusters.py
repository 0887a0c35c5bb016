"""Real Ray clusters on this machine, and commands that run on them as users run them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.conftest import build_request

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "from rankonce.cli import main; main()"]
_OBJECT_STORE_BYTES = 100_000_000
_SYSTEM = {
    # A node that does not answer for three seconds is lost; Ray waits longer by default.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
    # Workers are nice to others by default, which on a busy machine takes for ever.
    "worker_niceness": 0,
}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Start a cluster of two nodes of one CPU, which inherit the environment of this process."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for options in ({"_system_config": _SYSTEM, "include_dashboard": False}, {}):
            cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES, **options)
        yield cluster
    finally:
        cluster.shutdown()


class Running:
    """A command under way; what it says on stderr is kept as it comes."""

    def __init__(self, arguments: Sequence[str | Path]) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "RAY_worker_niceness": "0"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, seen: Callable[[], Any], *, seconds: float = 300) -> Any:
        """Wait until something is seen, and give it."""
        deadline = time.monotonic() + seconds
        while not (found := seen()):
            assert self.process.poll() is None, f"it ended: {self.log}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.log}"
            time.sleep(0.05)
        return found

    def finish(self, *, seconds: float = 600) -> int:
        """Wait for its end."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stdout is not None
            self.out = self.process.stdout.read()
            self.process.stdout.close()
            assert self.process.stderr is not None
            self.process.stderr.close()
        return code


@contextmanager
def running(*arguments: str | Path) -> Iterator[Running]:
    """Run a command, and see that it does not outlive the test."""
    command = Running(arguments)
    try:
        yield command
    finally:
        if command.process.returncode is None:
            command.process.kill()
            command.finish()


def write_requests(path: Path, num_requests: int, *, num_candidates: int = 10) -> list[Any]:
    """Write requests as JSON lines or Parquet, and give them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [
        {**asdict(build_request(num_candidates, seed=seed)), "id": str(seed)}
        for seed in range(num_requests)
    ]
    rows = [json.loads(json.dumps(one)) for one in made]
    if path.suffix == ".parquet":
        texts = [
            {
                **row,
                **{name: json.dumps(row[name]) for name in ("profile", "history", "candidates")},
            }
            for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(texts), path, row_group_size=50)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return rows
