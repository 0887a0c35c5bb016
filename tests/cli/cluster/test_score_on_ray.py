"""``rankonce score --ray`` on two nodes: whatever dies, every request is scored once, as offline.

The nodes are on one machine. Each has processes of its own for everything that a node has, and is
lost when those are killed.
"""

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rankonce.cli.options import load_ranker
from rankonce.records import read_request
from tests.cli.cluster.clusters import Running, running, two_nodes, write_requests

pytest.importorskip("ray", reason="ray is not installed: make test-ray brings it")
pytestmark = pytest.mark.slow
NUM_SHARDS, SHARD_ROWS = 12, 50
SCORED = re.compile(r"(shard-\d+) \(\d+ of \d+\): \d+ requests on node (\w+), process (\d+)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, for tests that leave them alive."""
    with two_nodes() as one:
        yield one


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    write_requests(path, NUM_SHARDS * SHARD_ROWS)
    return path


@pytest.fixture(scope="module")
def offline(requests: Path, model: Path) -> list[list[float]]:
    """Give the values of every request's candidates, as one process scores them."""
    ranker = load_ranker(str(model))
    lines = requests.read_text().splitlines()
    results = ranker.score_many((read_request(json.loads(line)) for line in lines), progress=False)
    return [[candidate.value for candidate in one.candidates] for one in results]


def score_command(
    cluster: Any, requests: Path, out: Path, model: Path, *options: str
) -> list[str | Path]:
    return [
        *("score", requests, "--ray", "--ray-address", cluster.address, "--out", out),
        *("--model", model, "--shard-rows", str(SHARD_ROWS), *options),
    ]


def scored(command: Running) -> list[tuple[str, str, int]]:
    """Give name, node and process of every shard that the command told of."""
    found = [match for line in command.lines if (match := SCORED.match(line))]
    return [(one[1], one[2], int(one[3])) for one in found]


def result_files(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("shard-*") if "rejects" not in path.name)


def read_results(out: Path) -> list[dict[str, Any]]:
    """Read what a run wrote, in the order of the names."""
    records: list[dict[str, Any]] = []
    for path in result_files(out):
        if path.suffix == ".parquet":
            records += pq.read_table(path).to_pylist()
        else:
            records += map(json.loads, path.read_text().splitlines())
    return records


def assert_whole(out: Path, offline: list[list[float]]) -> None:
    """Check that every request is there once, in its place and with its scores."""
    records = read_results(out)
    assert [one["line"] for one in records] == [*range(1, len(offline) + 1)]
    for record, expected in zip(records, offline, strict=True):
        values = [candidate["value"] for candidate in record["candidates"]]
        assert values == pytest.approx(expected, abs=2e-5)
    assert not (out / "unfinished").exists()


def test_a_lost_node_loses_and_doubles_nothing(
    requests: Path, offline: list[list[float]], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        two_nodes() as cluster,
        running(*score_command(cluster, requests, out, model)) as command,
    ):
        # Both have finished a shard, so both are in the middle of another.
        command.wait_for(lambda: len({node for _, node, _ in scored(command)}) == 2)
        (worker,) = cluster.worker_nodes
        cluster.remove_node(worker, allow_graceful=False)
        assert command.finish() == 0, command.log
    print(command.log)  # docs/scale.md shows it
    assert command.out == ""
    lost = worker.node_id[:8]
    assert f"node {lost} is lost: its shards go to others" in command.lines
    assert_whole(out, offline)
    names = [name for name, _, _ in scored(command)]
    assert sorted(names) == [f"shard-{index:06d}" for index in range(NUM_SHARDS)]
    assert 1 <= sum(node == lost for _, node, _ in scored(command)) < NUM_SHARDS - 1
    assert f"scored {len(offline)} requests" in command.log


def test_a_killed_worker_is_replaced(
    cluster: Any, requests: Path, offline: list[list[float]], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(*score_command(cluster, requests, out, model)) as command:
        killed = command.wait_for(lambda: scored(command))[0][2]
        os.kill(killed, signal.SIGKILL)
        assert command.finish() == 0, command.log
    assert_whole(out, offline)
    assert len({process for _, _, process in scored(command)} - {killed}) >= 1


def test_a_killed_run_goes_on_where_it_was(
    cluster: Any, requests: Path, offline: list[list[float]], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(*score_command(cluster, requests, out, model)) as command:
        command.wait_for(lambda: len(scored(command)) >= 3)
        command.process.send_signal(signal.SIGKILL)
        command.finish()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert 3 <= len(done) < NUM_SHARDS
    refusals = [
        ((), "holds a run; --resume goes on with it"),
        (("--resume", "--precision", "bf16"), "another run: precision was null"),
    ]
    for options, fault in refusals:
        with running(*score_command(cluster, requests, out, model, *options)) as refused:
            assert refused.finish() == 1
        assert fault in refused.log
    with running(*score_command(cluster, requests, out, model, "--resume")) as command:
        assert command.finish() == 0, command.log
    # A worker of the run that was killed may have finished its shard meanwhile.
    resumed = re.search(rf"resumed after (\d+) of {NUM_SHARDS} shards", command.log)
    assert resumed is not None
    assert len(done) <= int(resumed[1]) < NUM_SHARDS
    assert len(scored(command)) == NUM_SHARDS - int(resumed[1])
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert_whole(out, offline)


def test_rows_of_parquet_become_parquet_and_bad_ones_lie_beside_them(
    cluster: Any, model: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "in.parquet", tmp_path / "out"
    rows = write_requests(path, 130, num_candidates=5)
    table = pq.read_table(path).to_pylist()
    table[60]["task"] = "song-skip"
    pq.write_table(pq.read_table(path).from_pylist(table), path, row_group_size=40)
    with running(*score_command(cluster, path, out, model)) as command:
        assert command.finish() == 0, command.log
    assert [one.name for one in result_files(out)] == [
        f"shard-{index:06d}.parquet" for index in range(3)
    ]
    records = read_results(out)
    assert [one["line"] for one in records] == [*range(1, 61), *range(62, 131)]
    assert [one["id"] for one in records] == [row["id"] for row in rows if row["id"] != "60"]
    (rejects,) = out.glob("*.rejects.jsonl")
    assert rejects.name == "shard-000001.rejects.jsonl"
    (reject,) = map(json.loads, rejects.read_text().splitlines())
    assert reject["line"] == 61
    assert "no task is called 'song-skip'" in reject["reason"]
    assert "rejected 1 requests" in command.log


def test_a_worker_out_of_memory_is_told_and_finished_shards_are_kept(
    cluster: Any, requests: Path, offline: list[list[float]], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--workers", "1", "--max-tokens-per-pass", "500000")
    with running(*score_command(cluster, requests, out, model, *options)) as command:
        process = command.wait_for(lambda: scored(command))[0][2]
        # It may keep what it has, and no more: the next large tensor is refused.
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
        bound = pages * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(process, resource.RLIMIT_AS, (bound, bound))
        assert command.finish() == 1, command.log
    message = command.lines[-1]
    print(message)
    assert re.match(r"error: shard-\d+, lines \d+ to \d+: the worker is out of memory", message)
    assert "have fewer --workers a machine, or a smaller --max-tokens-per-pass" in message
    assert f"the shards that are done are in {out}, --resume goes on" in message
    done = {path.name: path.stat().st_mtime_ns for path in result_files(out)}
    assert done
    with running(*score_command(cluster, requests, out, model, "--resume")) as command:
        assert command.finish() == 0, command.log
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in result_files(out)}.items()
    assert_whole(out, offline)


def test_a_shard_that_kills_every_worker_is_named(
    cluster: Any, model: Path, tmp_path: Path
) -> None:
    # The last shard takes seconds, so that none is finished before the kill comes.
    path, long = tmp_path / "in.jsonl", tmp_path / "long.jsonl"
    write_requests(path, 3 * SHARD_ROWS)
    write_requests(long, SHARD_ROWS, num_candidates=150)
    path.write_text(path.read_text() + long.read_text())
    out, killed = tmp_path / "out", set[int]()

    def kill() -> bool:
        """Do what the kernel does to a process that takes too much memory."""
        for path in out.glob("unfinished/shard-000003.*"):
            process = int(path.name.split(".")[1].split("-")[0])
            if process not in killed:
                os.kill(process, signal.SIGKILL)
                killed.add(process)
        return len(killed) == 3

    options = ("--workers", "1")
    with running(*score_command(cluster, path, out, model, *options)) as command:
        command.wait_for(kill, seconds=400)
        assert command.finish() == 1, command.log
    message = command.lines[-1]
    print(message)
    assert message.startswith("error: shard-000003, lines 151 to 200: 3 workers died while they")
    assert "as they do when a machine is out of memory" in message
    assert (out / "shard-000000.jsonl").exists()
    assert not (out / "shard-000003.jsonl").exists()


def test_a_model_that_is_not_there_is_named(cluster: Any, requests: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with running(*score_command(cluster, requests, tmp_path / "out", gone)) as command:
        assert command.finish() == 1
    assert command.lines[-1].startswith("error: ")
    assert str(gone) in command.lines[-1]
    assert "Traceback" not in command.log


def test_a_cluster_that_is_not_there_is_named(requests: Path, tmp_path: Path) -> None:
    address = ("--ray-address", "127.0.0.1:1")
    arguments = ("score", requests, "--ray", *address, "--out", tmp_path / "out")
    with running(*arguments) as command:
        assert command.finish() == 1
    assert command.lines[-1].startswith("error: --ray-address: there is no Ray cluster at 127.0.")
    assert not (tmp_path / "out").exists()
