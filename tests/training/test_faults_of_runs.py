"""What would cost a whole training run is refused before it, and what a kill leaves is mended."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rankonce.errors import DataError, TrainingError
from rankonce.evaluation.held_out import measure_held_out
from rankonce.records import Item, ScoreRequest, TrainingExample
from rankonce.training import runs
from rankonce.training.checkpoint import trained_tasks
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, label_source


def examples(*labels: object) -> list[TrainingExample]:
    items = tuple(Item(fields={"title": f"Film {number}"}) for number in range(len(labels)))
    request = ScoreRequest(task="movie-like", candidates=items)
    return [TrainingExample(request=request, labels=labels)] * 4  # type: ignore[arg-type]


def run(
    out: Path,
    valid: list[TrainingExample],
    model: str | None = None,
    losses: dict[str, float] | None = None,
) -> None:
    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return label_source(
            lambda number: examples("Yes", "No", "Yes"),
            tasks=tasks,
            valid=valid,
            losses=losses,
            fingerprint={},
        )

    config = TrainConfig(epochs=1, targets_per_step=6, steps_per_checkpoint=1)
    run_stages(
        [Stage(name="finetune", load=load, config=config)],
        out,
        out,
        name="finetune",
        size="0.07m",
        seed=0,
        model=model,
        evaluate=measure_held_out,
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs: should be from 1 to inf, is 0"),
        ("steps_per_checkpoint", 0, "steps_per_checkpoint: should be from 1"),
        ("buffer_size", 0, "buffer_size: should be from 1"),
        ("learning_rate", -1e-3, "learning_rate: should be from 0 to inf, is -0.001"),
        ("learning_rate", float("nan"), "learning_rate: should be from 0 to inf, is nan"),
        ("dropout", 1.5, "dropout: should be from 0 to 1, is 1.5"),
        ("averaging", 1.0, "averaging: should be below 1"),
        ("warmup_share", 1.0, "warmup_share: should be below 1"),
        ("first_dropout", 1.0, "first_dropout: should be below 1"),
    ],
)
def test_a_setting_out_of_bounds_is_named(name: str, value: float, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_soft_labels_may_be_held_out(tmp_path: Path) -> None:
    run(tmp_path, examples({"Yes": 0.7, "No": 0.3}, None, {"Yes": 0.2, "No": 0.8}))
    measured = json.loads((tmp_path / "stages" / "1-finetune" / "evaluation.json").read_text())
    numbers = measured["movie-like"]
    assert set(numbers) == {"labels", "log_loss", "distinct_score_ratio"}
    assert numbers["labels"] == 8
    # Between what the shares themselves cost and what a coin that is always wrong would.
    assert 0.5 < numbers["log_loss"] < 2


def test_held_out_requests_without_a_label_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="valid: labels: should be known of one candidate"):
        run(tmp_path, examples(None, None))
    assert not (tmp_path / "stages").exists()


def test_a_start_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    # As a kill leaves it: the configuration is there, the weights are not.
    unfinished = tmp_path / ".start"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    run(tmp_path, [])
    assert not unfinished.exists()
    assert (tmp_path / "start" / "model.safetensors").is_file()


def test_the_last_validation_comes_before_the_last_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, examples("Yes", "No", "No"))
    folder = tmp_path / "stages" / "1-finetune"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "valid_loss" in line]
    # A run that is killed after its last checkpoint has the loss, one before it gets it again.
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert int(newest.name) == last["step"]
    assert (folder / "metrics.jsonl").stat().st_mtime_ns <= newest.stat().st_mtime_ns


def test_a_run_knows_the_tasks_of_its_start(tmp_path: Path) -> None:
    run(tmp_path / "first", [])
    record = json.loads((tmp_path / "first" / "run.json").read_text())
    record["tasks"] = {"song-next": "an earlier task's fingerprint"}
    (tmp_path / "first" / "run.json").write_text(json.dumps(record))
    run(tmp_path / "second", [], model=str(tmp_path / "first"))
    assert trained_tasks(tmp_path / "second") == ("movie-like", "song-next")


def test_a_finished_run_refuses_other_losses(tmp_path: Path) -> None:
    run(tmp_path, [])
    run(tmp_path, [])
    with pytest.raises(TrainingError, match="holds a run with another objective"):
        run(tmp_path, [], losses={"listwise": 1.0})


@pytest.mark.parametrize(
    ("labels", "valid", "message"),
    [
        (("Yes", "Maybe"), ("Yes", "No"), "example 1: labels: should be of Yes, No, is 'Maybe'"),
        (("Yes", "No"), ("Perhaps", "No"), "labels: should be of Yes, No, is 'Perhaps'"),
    ],
)
def test_a_faulty_label_leaves_no_folder_that_a_mended_file_would_not_get(
    tmp_path: Path, labels: tuple[str, ...], valid: tuple[str, ...], message: str
) -> None:
    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return label_source(
            lambda number: examples(*labels), tasks=tasks, valid=examples(*valid), fingerprint={}
        )

    with pytest.raises(DataError, match=message):
        run_stages(
            [Stage(name="finetune", load=load)],
            tmp_path,
            tmp_path / "out",
            name="finetune",
            size="0.07m",
            seed=0,
        )
    assert not (tmp_path / "out").exists()


def measure(*given: Any) -> Any:
    return measure_held_out(*given)


def run_two_stages(out: Path) -> dict[str, Tensor]:
    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return label_source(
            lambda number: examples("Yes", "No", "Yes"),
            tasks=tasks,
            valid=examples("Yes", "No"),
            fingerprint={},
        )

    config = TrainConfig(epochs=2, targets_per_step=6, steps_per_checkpoint=2, dropout=0.1)
    run_stages(
        [Stage(name=name, load=load, config=config) for name in ("first", "second")],
        out,
        out,
        name="both",
        size="0.07m",
        seed=3,
        evaluate=lambda *given: measure(*given),
    )
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("place", "turn"),
    [("_write_start", 1), ("train", 1), ("train", 2), ("measure", 1), ("measure", 2),
     ("_finish", 1), ("save_model", 2), ("finish_run", 1), ("write_model_card", 1)],
)  # fmt: skip
def test_a_run_that_is_killed_between_its_stages_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, turn: int
) -> None:
    whole = run_two_stages(tmp_path / "whole")
    called = []
    module = sys.modules[__name__] if place == "measure" else runs
    real = getattr(module, place)

    def kill(*arguments: Any, **options: Any) -> Any:
        called.append(place)
        if len(called) == turn:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, kill)
        with pytest.raises(KeyboardInterrupt):
            run_two_stages(tmp_path / "killed")
    again = run_two_stages(tmp_path / "killed")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for name in ("run.json", "README.md", "stages/2-second/evaluation.json"):
        assert (tmp_path / "killed" / name).exists()
