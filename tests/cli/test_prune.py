"""``rankonce prune`` and ``rankonce bench rungs``, from a file of examples to tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce import ranker as ranker_module
from rankonce.model.loading import load_model
from rankonce.training.checkpoint import trained_tasks
from tests.conftest import build_network, build_tokenizer
from tests.training.test_loop import write_examples


@pytest.fixture(autouse=True)
def _load_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # The cache of this folder's tests would give back a network without its acceleration.
    monkeypatch.setattr(ranker_module, "load_model", load_model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "whole"
    build_network("qwen3").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"tasks": {"movie-like": "0ab"}}))
    return folder


def test_a_share_of_the_parameters_is_kept_and_a_table_printed(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    data = tmp_path / "examples.jsonl"
    write_examples(data, 6)
    done = run("prune", whole, "--data", data, "--out", tmp_path / "out", "--keep", "0.67")
    assert done.exit_code == 0, done.err
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    before, after = record["before"]["parameters"], record["after"]["parameters"]
    assert 0.62 * before < after <= 0.67 * before
    (line,) = (line for line in done.out.splitlines() if "parameters" in line)
    assert f"{before:,}" in line
    assert f"{after:,}" in line
    assert f"{after / before:.1%}" in line
    assert done.err.splitlines()[-1] == f"model: {tmp_path / 'out'}"


def test_a_smaller_model_still_knows_what_it_was_trained_on(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    data, cut, quantized = (tmp_path / name for name in ("examples.jsonl", "cut", "quantised"))
    write_examples(data, 3)
    assert run("prune", whole, "--data", data, "--out", cut, "--layers", "1").exit_code == 0
    assert trained_tasks(cut) == ("movie-like",)
    assert run("quantize", cut, "--to", "cpu-int8", "--out", quantized).exit_code == 0
    assert trained_tasks(quantized) == ("movie-like",)


def test_all_options_reach_the_record(run: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    data = tmp_path / "examples.jsonl"
    write_examples(data, 4)
    done = run(
        *("prune", whole, "--data", data, "--out", tmp_path / "out", "--layers", "2"),
        *("--intermediate-size", "61", "--kv-heads", "1", "--hidden-size", "40", "--seed", "3"),
        *("--drop-unused-vocabulary", "--importance", "taylor", "--reconstruct"),
    )
    assert done.exit_code == 0, done.err
    config = json.loads((tmp_path / "out" / "pruning.json").read_text())["config"]
    assert config == {
        "keep": None,
        "num_hidden_layers": 2,
        "intermediate_size": 61,
        "num_key_value_heads": 1,
        "hidden_size": 40,
        "drop_unused_vocabulary": True,
        "importance": "taylor",
        "reconstruct": True,
        "seed": 3,
    }


def test_what_cannot_be_pruned_is_refused(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    data = tmp_path / "examples.jsonl"
    write_examples(data, 2)
    command = ("prune", whole, "--data", data, "--out", tmp_path / "out")
    assert "keep: should be given" in run(*command).err
    assert "num_key_value_heads: should be from 1 to 2" in run(*command, "--kv-heads", "5").err
    assert run(*command, "--importance", "size").exit_code == 2
    folder = run("prune", whole, "--data", tmp_path, "--keep", "0.5", "--out", tmp_path / "out")
    assert folder.exit_code == 2
    assert "--recipe" in folder.err
    assert not (tmp_path / "out").exists()


def test_rungs_are_measured_side_by_side(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    data, small = tmp_path / "examples.jsonl", tmp_path / "small"
    write_examples(data, 4)
    done = run("prune", whole, "--data", data, "--out", small, "--intermediate-size", "24")
    assert done.exit_code == 0, done.err
    int8 = tmp_path / "int8"
    assert run("quantize", whole, "--to", "cpu-int8", "--out", int8).exit_code == 0
    # What this process holds is not what a checkpoint takes.
    ballast = torch.ones(400_000_000)
    done = run("bench", "rungs", whole, small, int8, "--data", data, "--rounds", "2", "--json")
    assert done.exit_code == 0, done.err
    record = json.loads(done.out)
    first, second, third = record["rungs"]
    assert first["ratios"]["latency_ms"] == 1
    # Three layers with three projections of 72 neurons less, in FP32.
    assert first["parameters"] - second["parameters"] == 3 * 3 * 72 * 48
    assert first["weights_mb"] == pytest.approx(first["parameters"] * 4 / 1e6)
    assert third["parameters"] == first["parameters"]
    assert third["weights_mb"] < first["weights_mb"]
    assert second["ratios"]["parameters"] == second["parameters"] / first["parameters"]
    for rung in record["rungs"]:
        assert rung["weights_mb"] < rung["peak_memory_mb"] < ballast.nbytes / 1e6
        assert rung["tokens_per_s"] > rung["candidates_per_s"] > 0
        (quality,) = rung["quality"].values()
        assert quality["labels"] > 0


def test_steps_lead_to_the_sizes_of_one_cut(
    run: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    data = tmp_path / "examples.jsonl"
    write_examples(data, 4)
    cut = ("--data", data, "--keep", "0.4")
    assert run("prune", whole, *cut, "--out", tmp_path / "once").exit_code == 0
    way = ("--whole", whole, "--steps", "2", "--out")
    first = run("prune", whole, *cut, "--step", "1", *way, tmp_path / "1")
    assert first.exit_code == 0, first.err
    second = run("prune", tmp_path / "1", *cut, "--step", "2", *way, tmp_path / "2")
    assert second.exit_code == 0, second.err
    sizes = [
        json.loads((tmp_path / name / "pruning.json").read_text())["after"]
        for name in ("once", "1", "2")
    ]
    assert sizes[0] == sizes[2]
    assert sizes[0]["parameters"] < sizes[1]["parameters"]
    beyond = run("prune", whole, *cut, "--step", "3", *way, tmp_path / "3")
    assert (beyond.exit_code, beyond.err) == (1, "error: step: should be from 1 to 2, is 3\n")
    unknown = run("prune", tmp_path / "1", *cut, "--step", "2", "--steps", "2", "--out",
                  tmp_path / "3")  # fmt: skip
    assert unknown.exit_code == 2
    assert "model before the first step" in unknown.err
    alone = run("prune", whole, *cut, "--step", "1", "--out", tmp_path / "3")
    assert "are needed together" in alone.err
    nothing = run("prune", whole, *cut, "--step", "1", "--steps", "2", "--whole", tmp_path / "x",
                  "--out", tmp_path / "3")  # fmt: skip
    assert "is no checkpoint" in nothing.err
