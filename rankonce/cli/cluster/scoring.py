"""``rankonce score --ray``: shards read by tasks, scored and written by actors that hold a model.

Ray Data hands shards out and holds reading back while workers are busy; a shard whose worker or
node dies goes to another. What is done stands in the folder, never in the cluster.
"""

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from rankonce.cli.cluster.connection import (
    connected,
    count_gpus,
    import_ray,
    whole_paths,
    whole_source,
)
from rankonce.cli.cluster.shards import Shard, ShardFolder, plan_shards, read_shard
from rankonce.cli.cluster.worker import ShardScorer
from rankonce.cli.request_files import is_parquet
from rankonce.cli.summary import Summary
from rankonce.errors import ClusterError, RankOnceError, RequestError

# One that is scored and one that waits, so that a worker never idles; more would wait for a worker
# that died until it is there again.
_SHARDS_A_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class RayScoring:
    """A run on a cluster.

    Attributes:
        requests: JSON lines or Parquet, where every worker can read it.
        out: folder for the shards, where every worker can write.
        resume: go on with the shards that ``out`` lacks.
        shard_rows: lines or rows of a shard.
        workers: copies of the model; by default one a GPU, or one a CPU without any.
        address: of the cluster; by default one is started on this machine.
        loading: arguments of ``load_ranker``.
    """

    requests: Path
    out: Path
    resume: bool = False
    shard_rows: int
    workers: int | None = None
    address: str | None = None
    loading: Mapping[str, Any]


def score_on_ray(run: RayScoring) -> None:
    """Score a file of requests into a folder of shards, and tell on stderr what was done.

    Raises:
        ClusterError: the cluster cannot be reached or gave up, or a worker says that it cannot use
            the model or a shard; finished shards stay.
        DataError: the folder belongs to another run.
    """
    import_ray("data")  # what is missing should be known before a large file is read
    requests, out = run.requests.resolve(), run.out.resolve()
    loading = {**whole_paths(run.loading), "model": whole_source(run.loading["model"])}
    shards, digest = plan_shards(requests, shard_rows=run.shard_rows)
    folder = ShardFolder(out, suffix=".parquet" if is_parquet(requests) else ".jsonl")
    manifest = {
        "requests": digest,
        "shard_rows": run.shard_rows,
        "num_shards": len(shards),
        **_describe_scores(loading),
    }
    with connected(run.address, "data") as ray:
        folder.begin(manifest, resume=run.resume)
        pending = [shard for shard in shards if not folder.is_done(shard)]
        num_before = len(shards) - len(pending)
        if num_before:
            typer.echo(f"resumed after {num_before} of {len(shards)} shards", err=True)
        summary = Summary(rejects=run.out / "shard-*.rejects.jsonl")
        try:
            for told in _score(ray, run, pending, loading, folder) if pending else ():
                summary.add(told)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:500]
            raise ClusterError(f"the cluster gave up: {reason}; {_kept(run)}") from error
    missing = [shard.name for shard in shards if not folder.is_done(shard)]
    if missing:
        raise ClusterError(f"{len(missing)} shards are missing, {missing[0]} first; {_kept(run)}")
    folder.finish()
    typer.echo(summary.describe(), err=True)
    if summary.num_rejected and not summary.num_scored + num_before:
        raise RequestError(
            f"{run.requests}: none of the {summary.num_rejected} requests could be scored; the "
            f"first one, line {summary.first_reject}"
        )


def _kept(run: RayScoring) -> str:
    return f"the shards that are done are in {run.out}, --resume goes on with the others"


def _score(
    ray: Any,
    run: RayScoring,
    pending: Sequence[Shard],
    loading: Mapping[str, Any],
    folder: ShardFolder,
) -> Iterator[Summary]:
    """Score shards, tell of each that is done, and give its summary."""
    nodes = _Nodes(ray)
    for num_done, row in enumerate(_rows(ray, run, pending, loading, folder), start=1):
        nodes.tell_of_lost()
        if row["error"]:
            raise ClusterError(f"{row['error']}; {_kept(run)}")
        summary: Summary = pickle.loads(row["summary"])
        typer.echo(
            f"{row['name']} ({num_done} of {len(pending)}): {summary.num_scored:,} requests on "
            f"node {row['node'][:8]}, process {row['process']}",
            err=True,
        )
        yield summary


def _rows(
    ray: Any,
    run: RayScoring,
    pending: Sequence[Shard],
    loading: Mapping[str, Any],
    folder: ShardFolder,
) -> Iterator[dict[str, Any]]:
    """Give what workers say of every shard, as they finish."""
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    context = DataContext.get_current()
    # Ray Data would draw its own on stdout, and count blocks.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    num_gpus = count_gpus(ray, loading["device"])
    workers = run.workers or num_gpus or int(ray.cluster_resources().get("CPU", 0))
    if not workers:
        raise ClusterError("--workers: the cluster has neither a GPU nor a CPU")
    path = run.requests.resolve()
    # A block a shard: what is not handed out yet can go to any worker.
    waiting = ray.data.from_items(
        [asdict(one) for one in pending], override_num_blocks=len(pending)
    )
    # Reading takes no CPU of those that workers have taken, or nothing would ever be read.
    read = waiting.map(
        read_row,
        fn_kwargs={"path": path},
        compute=TaskPoolStrategy(size=workers),
        num_cpus=0,
    )
    scored = read.map(
        ShardScorer,
        fn_constructor_kwargs={"path": path, "folder": folder, "loading": loading},
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_SHARDS_A_WORKER),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )
    yield from scored.iter_rows()


def read_row(row: dict[str, Any], *, path: Path) -> dict[str, Any]:
    """Read the requests of a shard, in a task of Ray Data."""
    shard = Shard(**{name: int(value) for name, value in row.items()})
    try:
        return {**row, "content": read_shard(path, shard), "error": ""}
    except (RankOnceError, OSError) as error:
        return {**row, "content": b"", "error": f"{shard.name}: {error}"}


def _describe_scores(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what decides the scores beside the requests."""
    from rankonce.calibration import CALIBRATION_FILE
    from rankonce.distillation.store import fingerprint_task
    from rankonce.distillation.teachers import fingerprint_checkpoint
    from rankonce.prompts.tasks import load_task
    from rankonce.ranker import EMBEDDED_MODEL

    def describe(source: str | Path) -> list[str]:
        calibration = Path(source) / CALIBRATION_FILE
        fitted = [calibration.read_text(encoding="utf-8")] if calibration.is_file() else []
        return [fingerprint_checkpoint(str(source), None), *fitted]

    tasks = [load_task(path) for path in loading["task_files"] or ()]
    return {
        "model": describe(loading["model"] or EMBEDDED_MODEL),
        "adapters": {name: describe(path) for name, path in (loading["adapters"] or {}).items()},
        "tasks": {task.name: fingerprint_task(task) for task in tasks},
        "precision": loading["precision"],
        "keep": list(loading["keep"] or ()),
        "chat": loading["chat"],
        "label_mass": loading["label_mass"],
    }


class _Nodes:
    """The machines of the cluster, as they were last seen."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._alive = self._find_alive()

    def tell_of_lost(self) -> None:
        """Say on stderr which of them are gone."""
        alive = self._find_alive()
        for node in sorted(self._alive - alive):
            typer.echo(f"node {node[:8]} is lost: its shards go to others", err=True)
        self._alive = alive

    def _find_alive(self) -> set[str]:
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
