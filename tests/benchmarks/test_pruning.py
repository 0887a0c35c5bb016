"""The study of pruning without training, on a few real members."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rankonce.benchmarks.pruning import PruningStudy, describe_pruning, measure_pruning
from rankonce.ranker import EMBEDDED_MODEL
from tests.conftest import data_folder


def test_every_arm_is_compared_with_the_whole_ranker(tmp_path: Path) -> None:
    study = PruningStudy(
        data=data_folder("ml-small"),
        keeps=(0.5,),
        num_calibration=2,
        num_valid=4,
        seeds=(0,),
        output=tmp_path / "pruning.json",
    )
    record = measure_pruning(study)
    whole, *arms = record["arms"]
    embedded = load_file(EMBEDDED_MODEL / "model.safetensors")
    assert whole["sizes"]["parameters"] == sum(weights.numel() for weights in embedded.values())
    assert [arm["arm"] for arm in arms] == [
        "unused vocabulary dropped", "0.5 activation", "0.5 taylor", "0.5 random, seed 0",
        "0.5 activation, reconstruct", "0.5 taylor, reconstruct", "0.5 activation, vocabulary",
    ]  # fmt: skip
    for arm in arms:
        difference = arm["auc_difference"]
        assert difference["difference"] == pytest.approx(arm["auc"] - whole["auc"])
        assert difference["low"] <= difference["high"]
        assert arm["sizes"]["parameters"] < whole["sizes"]["parameters"]
    assert len(describe_pruning(record).splitlines()) == 2 + len(record["arms"])
