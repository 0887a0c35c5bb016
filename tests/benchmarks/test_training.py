"""The training benchmarks on a model of a few weights: same gradients, tables of what was found."""

import json
from pathlib import Path

import pytest

from rankonce.benchmarks import training_options
from rankonce.benchmarks.training import (
    PACKED,
    PADDED,
    SEPARATE,
    TrainingOptions,
    describe_training,
    measure_training,
)
from rankonce.benchmarks.training_options import describe_options, measure_passes
from rankonce.errors import DataError


def test_every_arm_takes_the_same_gradients(tmp_path: Path) -> None:
    output = tmp_path / "packed.json"
    options = TrainingOptions(size="1m", num_candidates=3, rounds=1, output=output)
    record = measure_training(options)
    assert json.loads(output.read_text()) == record
    arms = record["arms"]
    assert list(arms) == [PACKED, SEPARATE, PADDED]
    for arm in arms.values():
        assert arm["max_gradient_difference"] <= 1e-5
        assert arm["median_s"] > 0
    prefix = record["prefix_tokens"]
    assert arms[SEPARATE]["tokens"] == arms[PACKED]["tokens"] + 2 * prefix
    assert arms[PADDED]["tokens"] >= arms[SEPARATE]["tokens"]
    assert f"| {PACKED} | {arms[PACKED]['tokens']:,} | 1.0× |" in describe_training(record)


def test_more_candidates_than_there_are_films_are_refused() -> None:
    with pytest.raises(DataError, match="candidates: should be from 1 to 100, is 101"):
        measure_training(TrainingOptions(num_candidates=101))


def test_checkpointing_and_bf16_keep_less() -> None:
    kept = {name: arm["kept_mb"] for name, arm in measure_passes("1m").items()}
    assert kept["fp32, checkpointed"] < 0.4 * kept["fp32"]
    assert kept["bf16"] < kept["fp32"]


def test_differences_are_paired_by_seed() -> None:
    default, other = list(training_options.ARMS)[:2]
    runs = [
        {"arm": arm, "seed": seed, "log_loss": base + added, "auc": 0.7 + base - 2 * added}
        for seed, base in enumerate((0.5, 0.6, 0.4))
        for arm, added in ((default, 0.0), (other, 0.01))
    ]
    table = describe_options({"runs": runs, "passes": {"arms": {}}})
    assert f"| {default} | 0.5000 |  | 1.2000 |  |" in table
    assert f"| {other} | 0.5100 | +0.0100 ± 0.0000 | 1.1800 | -0.0200 ± 0.0000 |" in table
