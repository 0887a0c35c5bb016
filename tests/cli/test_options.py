"""Options that several commands share."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from rankonce.cli import app
from rankonce.cli.evaluate import evaluate
from rankonce.cli.explain_prompt import explain_prompt
from rankonce.cli.options import Precision
from rankonce.cli.score import score
from rankonce.cli.serve import serve
from rankonce.model import acceleration
from rankonce.model.precision import PRECISIONS
from rankonce.training.loop import TrainConfig
from tests.cli.conftest import Run, write_lines

Command = Callable[..., Run]


def test_the_precisions_of_the_command_line_are_those_of_the_model() -> None:
    assert [precision.value for precision in Precision] == [*PRECISIONS]


@pytest.mark.parametrize("command", [score, serve, evaluate, explain_prompt])
def test_commands_that_load_a_ranker_take_its_precision(command: Callable[..., None]) -> None:
    options = inspect.signature(command).parameters
    assert {"model", "device", "precision", "keep", "trust_remote_code"} <= options.keys()


def training_options(name: str) -> dict[str, Any]:
    return {option.name: option for option in typer.main.get_command(app).commands[name].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["pretrain", "instruct", "train"])
def test_what_training_commands_share_reads_the_same_in_each(name: str) -> None:
    own, finetune = training_options(name), training_options("finetune")
    # What these are of differs: files or a folder, labels or tokens.
    meant_otherwise = {"data", "valid", "epochs", "targets_per_step", "max_steps"}
    shared = (own.keys() & finetune.keys()) - meant_otherwise
    assert {"out", "model", "size", "seed"} <= shared
    for option in shared:
        for part in ("help", "opts", "min", "max", "metavar", "multiple"):
            assert getattr(own[option], part) == getattr(finetune[option], part), (option, part)


def test_finetune_starts_from_the_defaults_of_its_configuration() -> None:
    options = training_options("finetune")
    settings = {field.name: field.default for field in fields(TrainConfig)}
    shared = options.keys() & settings.keys()
    assert len(shared) == 9
    assert {name: options[name].default for name in shared} == {n: settings[n] for n in shared}


@pytest.mark.parametrize("name", ["finetune", "pretrain", "instruct", "train"])
def test_a_size_beside_a_checkpoint_is_bad_usage(run: Run, tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / "in.jsonl", ["{}"])
    given = {"instruct": ("--examples", file), "train": ("ml1m", "--data", tmp_path)}
    where = given.get(name, ("--data", file))
    done = run(name, *where, "--out", tmp_path / "out", "--model", "m", "--size", "1m")
    assert done.exit_code == 2
    assert "--size" in done.err
    assert "is for training from scratch" in done.err


def score_values(run: Command, file: Path, *options: str | Path) -> list[float]:
    done = run("score", file, "--device", "cpu", *options)
    assert done.exit_code == 0
    return [one["value"] for record in done.records for one in record["candidates"]]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_every_precision_scores(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path, precision: str
) -> None:
    file = write_lines(tmp_path / "in.jsonl", requests)
    expected = score_values(run, file, "--model", model)
    values = score_values(run, file, "--model", model, "--precision", precision)
    assert values != expected
    assert values == pytest.approx(expected, abs=2.0)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_embedded_ranker_runs_in_8_and_4_bits(
    run: Command, requests: list[dict[str, Any]], tmp_path: Path, precision: str
) -> None:
    file = write_lines(tmp_path / "in.jsonl", requests)
    expected = score_values(run, file)
    assert score_values(run, file, "--precision", precision) == pytest.approx(expected, abs=0.5)


def test_layers_that_are_kept_are_not_quantised(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", requests)
    fp8 = ("--model", model, "--precision", "fp8")
    plain = score_values(run, file, "--model", model)
    everything = score_values(run, file, *fp8, "--keep", "*_proj")
    assert everything == pytest.approx(plain, abs=1e-6)
    some = score_values(run, file, *fp8, "--keep", "*.down_proj", "--keep", "*.o_proj")
    assert some not in (plain, score_values(run, file, *fp8))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--precision", "fp8", "--keep", "lm_head"), "keep: 'lm_head' names no linear layer; "),
        (("--keep", "*.down_proj"), "keep: names layers that FP8 leaves as they are; precision "),
        (("--precision", "nf4"), "precision: nf4 on a CPU takes layers of a multiple of 64 "),
    ],
)
def test_options_that_the_model_cannot_follow_exit_with_1(
    run: Command, model: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    file = write_lines(tmp_path / "in.jsonl", ["{}"])
    done = run("score", file, "--model", model, "--device", "cpu", *options)
    assert (done.exit_code, done.out) == (1, "")
    assert done.err.startswith(f"error: {fault}")


def test_serve_logs_once_how_the_model_runs(
    run: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankonce.serving import app

    rankers: list[Any] = []

    def run_server(ranker: Any, _config: Any, listener: Any, _operations: Any) -> bool:
        listener.close()
        rankers.append(ranker)
        return True

    monkeypatch.setattr(app, "run_server", run_server)
    acceleration._log_line.cache_clear()
    options = ("--precision", "fp8", "--keep", "*layers.0.*", "--device", "cpu", "--port", "0")
    done = run("serve", "--model", model, *options)
    assert done.exit_code == 0
    (ranker,) = rankers
    report = ranker.model.acceleration.report
    assert "9 of 13 products in FP8" in report[1]
    logged = [line.partition(": ")[2] for line in done.err.splitlines() if "Llama" in line]
    assert logged == [f"LlamaForCausalLM: {line}" for line in report]
