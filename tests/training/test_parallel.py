"""Two processes train what one trains: DDP and FSDP2 over gloo, as they run over GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankonce.cli import main
from rankonce.errors import TrainingError
from rankonce.ranker import Ranker
from rankonce.training.checkpoint import is_finished, latest_checkpoint
from rankonce.training.steps import share_passes, split_by_tokens
from tests.conftest import build_network, build_request, build_tokenizer
from tests.training.parallel_runs import (
    CONFIG,
    SHARDINGS,
    STAGES,
    STOPPED_AT,
    label_units,
    replace,
    run,
    run_stopped,
    token_units,
)
from tests.training.test_loop import write_examples

ROOT = Path(__file__).parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start a program with two processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.run(
        [sys.executable, *torchrun, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all runs with two processes, and those that are compared with one."""
    folder = tmp_path_factory.mktemp("parallel")
    done = launch("tests/training/parallel_runs.py", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in STAGES:
        run(folder / f"{stage}-alone", stage, CONFIG)
    return folder


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line.get("loss", line.get("valid_loss")) for line in metrics(out)]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_have_the_losses_and_weights_of_one(
    folder: Path, stage: str, sharding: str
) -> None:
    alone, both = folder / f"{stage}-alone", folder / f"{stage}-{sharding}"
    assert len(losses(alone)) > CONFIG.max_steps  # the valid losses are among them
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    for name in ("gradient_norm", "targets", "flop_per_s"):
        values = [[m[name] for m in metrics(out) if name in m] for out in (alone, both)]
        if name == "flop_per_s":
            # Per token, since time is what differs.
            values = [
                [m[name] / m["tokens_per_s"] for m in metrics(out) if name in m]
                for out in (alone, both)
            ]
        assert values[1] == pytest.approx(values[0], rel=1e-4)
    for out, devices in ((alone, 1), (both, 2)):
        for line in metrics(out):
            if "loss" in line:
                peak = devices * 0.5e12
                assert line["flop_utilisation"] == pytest.approx(line["flop_per_s"] / peak)
    expected, actual = (load_file(out / "model.safetensors") for out in (alone, both))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_stopped_processes_resume_with_the_same_bits(folder: Path, sharding: str) -> None:
    straight, stopped = folder / f"dropout-{sharding}", folder / f"stopped-{sharding}"
    assert losses(stopped) == losses(straight)
    expected, actual = (load_file(out / "model.safetensors") for out in (straight, stopped))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    newest = latest_checkpoint(stopped)
    assert newest is not None
    assert newest[0] == 4 > STOPPED_AT
    assert len(list((newest[1] / "state").glob("process-*.pt"))) == 2


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_dropout_differs_between_processes(folder: Path, sharding: str) -> None:
    newest = latest_checkpoint(folder / f"dropout-{sharding}")
    assert newest is not None
    first, second = (
        torch.load(newest[1] / "state" / f"process-{rank}.pt", weights_only=True)["random"]["cpu"]
        for rank in range(2)
    )
    assert not torch.equal(first, second)


def test_one_process_resumes_with_the_same_bits(folder: Path) -> None:
    config = replace(CONFIG, dropout=0.1)
    run(folder / "one-straight", "labels", config)
    run_stopped(folder / "one-stopped", "labels", config)
    assert losses(folder / "one-stopped") == losses(folder / "one-straight")


def test_one_process_goes_on_from_the_parts_of_two(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded = folder / "labels-fsdp"
    out = folder / "continued"
    config = replace(CONFIG, sharding="none")
    # The run of two, taken back to its checkpoint of step 4 and given to one.
    (out / "checkpoints").parent.mkdir()
    (sharded / "checkpoints").rename(out / "checkpoints")
    (out / "metrics.jsonl").write_text((sharded / "metrics.jsonl").read_text())
    run(out, "labels", config)
    (sharded / "checkpoints").symlink_to(out / "checkpoints")
    assert "1 processes after 2" in caplog.text
    assert losses(out) == pytest.approx(losses(folder / "labels-alone"), rel=1e-5)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_sharded_checkpoint_is_a_whole_model(folder: Path, sharding: str) -> None:
    newest = latest_checkpoint(folder / f"tokens-{sharding}")
    assert newest is not None
    network = AutoModelForCausalLM.from_pretrained(newest[1])
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert network.model.embed_tokens.weight.shape == (640, 48)
    assert is_finished(folder / f"tokens-{sharding}")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_in_bf16_stay_close(folder: Path, sharding: str) -> None:
    both = losses(folder / f"bf16-{sharding}")[:2]
    alone = losses(folder / "labels-alone")[:2]
    assert both != alone
    assert both == pytest.approx(alone, rel=0.05)


def test_a_loss_that_is_not_finite_stops_every_process(folder: Path) -> None:
    messages = {(folder / f"error-{rank}.txt").read_text() for rank in range(2)}
    assert messages == {"loss: is nan; lower the learning rate or look at the data"}


@pytest.mark.slow
def test_the_command_line_trains_with_two_processes(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.jsonl", count=8)
    options = ("--size", "1m", "--epochs", "1", "--targets-per-step", "24", "--sharding", "fsdp")
    arguments = [*options, "--data", str(tmp_path / "examples.jsonl"), "--out"]
    # The second time everything is finished, and no process waits for another.
    for _ in range(2):
        done = launch("-m", "rankonce.cli", "finetune", *arguments, str(tmp_path / "run"))
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("model:") == 1
    stage = tmp_path / "run" / "stages" / "1-finetune"
    assert [line["step"] for line in metrics(stage)] == [1, 2]
    assert (
        Ranker.from_pretrained(tmp_path / "run").score(build_request(5)).distinct_score_ratio == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_distil_two_readouts_as_one_does(tmp_path: Path, sharding: str) -> None:
    write_examples(tmp_path / "examples.jsonl", count=8)
    build_network("qwen3").save_pretrained(tmp_path / "teacher")
    build_tokenizer().save_pretrained(tmp_path / "teacher")
    options = ("--target", "two-logits", "--set", "epochs=1", "--set", "targets_per_step=24")
    paths = {"data": "examples.jsonl", "teacher": "teacher", "store": "scores.sqlite"}
    arguments = ["distill", "--size", "0.07m", *options]
    arguments += [part for name, to in paths.items() for part in (f"--{name}", str(tmp_path / to))]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "alone")])
    assert ended.value.code == 0
    both = ("--set", f"sharding={sharding}", "--out", str(tmp_path / "both"))
    done = launch("-m", "rankonce.cli", *arguments, *both)
    assert done.returncode == 0, done.stderr[-4000:]
    # One process asked for all of it, the run of two found it in the store.
    assert "teacher: 0 calls for 0 candidates" in done.stderr
    stages = [tmp_path / name / "stages" / "1-distill" for name in ("both", "alone")]
    assert losses(stages[0]) == pytest.approx(losses(stages[1]), rel=1e-5)
    first, second = (load_file(stage / "model.safetensors") for stage in stages)
    assert first.keys() == second.keys()
    for name, weight in second.items():
        torch.testing.assert_close(first[name], weight, atol=2e-5, rtol=1e-4)


def test_one_process_has_nothing_to_shard_among(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="sharding: fsdp needs several processes"):
        run(tmp_path, "tokens", replace(CONFIG, sharding="fsdp"))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [1, 63, 500, 2000])
def test_passes_are_shared_evenly_and_lose_nothing(num_processes: int, budget: int) -> None:
    units: list[Any] = [*label_units()[:5], *token_units()]
    shares = [
        share_passes(units, max_tokens_per_pass=budget, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [unit for share in shares for part, weight in share if weight for unit in part]
    assert sorted(map(id, counted)) == sorted(map(id, units))
    assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}
    for part, _ in (one for share in shares for one in share):
        assert len(part) == 1 or sum(unit.num_tokens for unit in part) <= budget
    # No process takes more passes than an even share of what one process takes.
    alone = len(split_by_tokens(units, max_tokens_per_pass=budget))
    assert len(shares[0]) == -(-alone // num_processes)
