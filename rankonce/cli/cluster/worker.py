"""A worker of ``rankonce score --ray``: a model, and the shards that it gets."""

import os
import pickle
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rankonce.cli.cluster.shards import Shard, ShardFolder, shard_lines
from rankonce.cli.options import load_ranker
from rankonce.cli.result_files import RejectFile, open_results
from rankonce.cli.score import write_scores
from rankonce.cli.summary import Summary
from rankonce.errors import RankOnceError
from rankonce.ranker import Ranker

# A shard that this many workers began and did not finish would take the next one down as well.
_MAX_ATTEMPTS = 3
# What torch says where memory ends, on a GPU and on a CPU.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_ADVICE = "have fewer --workers a machine, or a smaller --max-tokens-per-pass"


class ShardScorer:
    """What an actor of Ray Data holds.

    Faults that a person has to mend come back in ``error``: Ray would wrap an exception in its
    own and show traces of its insides.

    Args:
        path: the requests.
        folder: takes the shards.
        loading: arguments of ``load_ranker``.
    """

    def __init__(self, *, path: Path, folder: ShardFolder, loading: Mapping[str, Any]) -> None:
        self._path = path
        self._folder = folder
        self._ranker: Ranker | None = None
        self._fault = ""
        try:
            self._ranker = load_ranker(**loading)
        except Exception as error:
            self._fault = explain(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score a shard, unless it cannot be read, and say what became of it."""
        import ray

        content, fault = row.pop("content"), row.pop("error") or self._fault
        shard = Shard(**{name: int(value) for name, value in row.items()})
        summary = Summary(rejects=None)
        if not fault:
            assert self._ranker is not None, "a ranker or a fault"
            try:
                self._score(self._ranker, shard, content, summary)
            except Exception as error:
                fault = f"{shard.name}, lines {shard.first} to {shard.last}: {explain(error)}"
        return {
            "name": shard.name,
            "error": fault,
            "summary": pickle.dumps(summary),
            "node": ray.get_runtime_context().get_node_id(),
            "process": os.getpid(),
        }

    def _score(self, ranker: Ranker, shard: Shard, content: bytes, summary: Summary) -> None:
        if self._folder.attempts(shard) >= _MAX_ATTEMPTS:
            raise RankOnceError(
                f"{_MAX_ATTEMPTS} workers died while they scored it, as they do when a machine is "
                f"out of memory: {_ADVICE}"
            )
        results_path, rejects_path = self._folder.attempt(shard)
        lines = shard_lines(content, shard, self._path)
        with closing(open_results(results_path, resume=False)) as results:
            write_scores(ranker, lines, results, RejectFile(rejects_path), summary)
        self._folder.publish(shard, results_path, rejects_path)


def explain(error: Exception) -> str:
    """Say what a person can do about an exception; raise it again if that is nothing.

    Returns:
        The message of an error that names its cure, or of memory that ended.
    """
    if isinstance(error, RankOnceError | OSError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _OUT_OF_MEMORY)
    ):
        return f"the worker is out of memory ({text[:200] or 'malloc'}): {_ADVICE}"
    raise error
