from pathlib import Path

import pytest

from rankonce.benchmarks.serve_models import load_offline_ranker, shared_checkpoint
from rankonce.benchmarks.serve_workloads import BENCH_SCORE, LoadWriter
from rankonce.errors import ModelError


def _scores(seed: int) -> list[list[float]]:
    with shared_checkpoint(Path("unused"), size="0.07m", seed=seed) as folder:
        writer = LoadWriter(load_offline_ranker(folder), BENCH_SCORE)
        return writer.score_offline(writer.write(0))


def test_random_weights_are_those_of_the_seed() -> None:
    assert _scores(1) == _scores(1)
    assert _scores(1) != _scores(2)


def test_a_checkpoint_is_taken_as_it_is_without_a_size() -> None:
    with shared_checkpoint(Path("some/folder"), size=None, seed=0) as folder:
        assert folder == Path("some/folder")


def test_an_unknown_size_is_refused() -> None:
    with (
        pytest.raises(ModelError, match="size: should be one of"),
        shared_checkpoint(Path("unused"), size="7b", seed=0),
    ):
        pass
