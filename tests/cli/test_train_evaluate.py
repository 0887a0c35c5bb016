"""``rankonce train`` and ``rankonce evaluate`` on a small dataset of planted taste."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rankonce import ranker
from rankonce.datasets.movielens import MovieRows, movie_rows
from rankonce.evaluation.metrics import auc
from rankonce.evaluation.protocols import score_rows
from rankonce.model.loading import load_model
from rankonce.ranker import Ranker
from rankonce.training.recipes import RECIPES
from tests.cli.conftest import Run

Command = Callable[..., Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows in which every film is good or bad and everybody agrees."""
    folder = tmp_path_factory.mktemp("films")
    random = np.random.default_rng(0)
    num_rows = 1200
    films = random.integers(1, 41, num_rows)
    users = random.integers(1, 31, num_rows)
    likes = (films % 2 == 0) ^ (random.random(num_rows) < 0.1)
    history: dict[int, list[int]] = {}
    histories = []
    for user, film, like in zip(users.tolist(), films.tolist(), likes.tolist(), strict=True):
        histories.append(list(history.setdefault(user, [])))
        if like:
            history[user].append(film)
    rows = pl.DataFrame(
        {
            "user_id": users,
            "item_id": films,
            "label": likes.astype(np.int8),
            "timestamp": np.arange(num_rows) * 100,
            "history_ids": pl.Series(histories, dtype=pl.List(pl.Int64)),
        }
    )
    rows.head(1000).write_parquet(folder / "train.parquet")
    rows.tail(200).write_parquet(folder / "valid.parquet")
    pl.DataFrame(
        {
            "item_id": range(1, 41),
            "title": [f"Film {i} ({1950 + i})" for i in range(1, 41)],
            "genres": [["Action", "Drama|War", ""][i % 3] for i in range(1, 41)],
        }
    ).write_parquet(folder / "items.parquet")
    return folder


def read_movies(data: Path) -> MovieRows:
    train, valid, items = (
        pl.read_parquet(data / f"{name}.parquet") for name in ("train", "valid", "items")
    )
    return movie_rows(valid, items, train=train)


def evaluate(run: Command, data: Path, *arguments: str | Path) -> Run:
    return run(
        "evaluate",
        *("--train", data / "train.parquet", "--items", data / "items.parquet"),
        *("--data", data / "valid.parquet", "--num-resamples", 20, *arguments),
    )


def test_a_recipe_trains_a_checkpoint_that_is_measured_beside_baselines(
    run: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run("train", "ml1m", "--data", data, "--out", out, "--set", "finetune.epochs=2")
    assert done.exit_code == 0, done.err
    assert done.out == ""
    record = json.loads((out / "run.json").read_text())
    assert record["run"] == "ml1m"
    assert record["config"]["finetune"]["epochs"] == 2
    card = (out / "README.md").read_text()
    assert "# ml1m" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| 1-finetune |"))
    assert float(row.split("|")[4].replace(",", "")) > 100  # tokens a second
    assert record["objective"]["finetune"]["unrated_per_row"] == 2
    assert set(record["data"]) == {"train.parquet", "valid.parquet", "items.parquet"}
    assert record["environments"][0]["commit"]

    done = evaluate(run, data, "--model", out, "--json")
    assert done.exit_code == 0, done.err
    result = json.loads(done.out)
    rows = {row["name"]: row for row in result["metrics"]}
    assert list(rows) == ["run", "item mean", "item mean + user mean", "LightGBM"]
    # One label in ten is flipped: a ranker that knows every film reaches .9.
    assert rows["item mean"]["metrics"]["auc"] > 0.85
    assert rows["run"]["metrics"]["auc"] > 0.8
    scores = score_rows(Ranker.from_pretrained(out), read_movies(data))[0]
    labels = pl.read_parquet(data / "valid.parquet")["label"].to_numpy()
    assert rows["run"]["metrics"]["auc"] == pytest.approx(auc(labels, scores), abs=1e-3)
    assert 0 < rows["run"]["standard_errors"]["auc"] < 0.1
    assert result["tokens"]["separate_tokens"] > result["tokens"]["computed_tokens"] > 0
    assert next(row["name"] for row in result["differences"]) == "run: AUC against item mean"

    cut = tmp_path / "cut"
    recipe = ("--recipe", "ml1m", "--data", data)
    done = run("prune", out, *recipe, "--keep", "0.67", "--out", cut)
    assert done.exit_code == 0, done.err
    sizes = json.loads((cut / "pruning.json").read_text())
    assert sizes["after"]["parameters"] <= 0.67 * sizes["before"]["parameters"]
    twice = run("prune", out, *recipe, "--data", data, "--keep", "0.67", "--out", cut)
    assert "should be the recipe's folder alone" in twice.err

    twin = tmp_path / "twin"
    twin.symlink_to(out)
    both = json.loads(evaluate(run, data, "--model", out, "--also", twin, "--json").out)
    named = {row["name"]: row for row in both["metrics"]}
    assert named["mean of 2 runs"]["metrics"] == named["twin"]["metrics"]
    assert set(named["mean of 2 runs"]["standard_errors"].values()) == {0.0}
    again = evaluate(run, data, "--model", out, "--also", out)
    assert (again.exit_code, again.err) == (
        1,
        "error: also: should hold folders of other names than run\n",
    )

    plot = tmp_path / "plot.png"
    table = evaluate(run, data, "--model", out, "--markdown", "--plot", plot).out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{rows['run']['metrics']['auc']:.4f}" in table


def test_a_recipe_trains_an_adapter_that_is_measured_over_its_backbone(
    run: Command, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache of this folder's tests takes no adapters.
    monkeypatch.setattr(ranker, "load_model", load_model)
    settings = ("epochs=1", "averaging=0", "learning_rate=0.02", "targets_per_step=32")
    done = run(
        *("train", "ml1m", "--data", data, "--out", tmp_path / "films", "--model", model),
        *("--lora-rank", "4", "--adapter-name", "films"),
        *(part for setting in settings for part in ("--set", f"finetune.{setting}")),
    )
    assert done.exit_code == 0, done.err

    def measure(*arguments: str | Path) -> float:
        rows = json.loads(evaluate(run, data, *arguments, "--json").out)["metrics"]
        return float(rows[0]["metrics"]["auc"])

    adapter = f"mine={tmp_path / 'films'}"
    backbone = measure("--model", model)
    adapted = measure("--model", model, "--adapter", adapter)
    assert adapted != backbone
    assert measure("--model", tmp_path / "films") == pytest.approx(adapted, abs=1e-6)


def test_a_recipe_gives_data_and_settings_to_a_student(
    run: Command, data: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    settings = ("max_steps=4", "averaging=0", "targets_per_step=32")
    done = run(
        *("distill", "--recipe", "ml1m", "--data", data, "--teacher", model, "--size", "0.07m"),
        *("--store", tmp_path / "scores.sqlite", "--out", out),
        *(part for setting in settings for part in ("--set", setting)),
    )
    assert done.exit_code == 0, done.err
    record = json.loads((out / "stages" / "1-distill" / "run.json").read_text())
    recipe = RECIPES["ml1m"]().stages[-1].config
    assert record["config"]["learning_rate"] == recipe.learning_rate
    assert record["config"]["max_steps"] == 4
    assert "Measured on held-out" in (out / "README.md").read_text()
    # The store holds what the teacher says of the examples of every step.
    lines = (out / "stages" / "1-distill" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]
    with sqlite3.connect(tmp_path / "scores.sqlite") as store:
        (count,) = store.execute("select count(*) from scores").fetchone()
    assert count >= 4 * 32


def test_an_unknown_recipe_is_named(run: Command, data: Path, tmp_path: Path) -> None:
    done = run("train", "ml2m", "--data", data, "--out", tmp_path / "x")
    assert (done.exit_code, done.err) == (
        1,
        "error: recipe: should be one of ml1m, ml1m-alone, ml-small, multitask, is 'ml2m'\n",
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.epoch=2", "set: a stage has the settings epochs, max_steps"),
        ("tune.epochs=2", "set: should be STAGE.NAME=VALUE with a stage of catalogue"),
        ("finetune.epochs=two", "set: epochs should be of int"),
        ("finetune.fp8=yes", "set: fp8 should be of bool, is 'yes'"),
        ("finetune.=2", "set: should be STAGE.NAME=VALUE with a stage of catalogue"),
        ("epochs=0.5", "set: should be STAGE.NAME=VALUE with a stage of catalogue"),
        ("finetune.sharding=zero", "sharding: should be one of none, fsdp, is 'zero'"),
    ],
)
def test_an_unknown_setting_is_named(
    run: Command, data: Path, tmp_path: Path, setting: str, message: str
) -> None:
    done = run("train", "ml1m", "--data", data, "--out", tmp_path / "x", "--set", setting)
    assert done.exit_code == 1
    assert message in done.err


def test_a_setting_that_is_given_twice_is_refused(run: Command, data: Path, tmp_path: Path) -> None:
    twice = ("--set", "finetune.epochs=1", "--set", "finetune.epochs=2")
    done = run("train", "ml1m", "--data", data, "--out", tmp_path / "x", *twice)
    assert (done.exit_code, done.err) == (1, "error: set: should name epochs once\n")
    examples = tmp_path / "examples.jsonl"
    examples.write_text("")
    for command, data_option, setting in (
        ("finetune", "--data", "epochs=3"),
        ("instruct", "--examples", "seed=3"),
        ("pretrain", "--data", "targets_per_step=64"),
    ):
        done = run(command, data_option, examples, "--out", tmp_path / "x", "--set", setting)
        name = setting.partition("=")[0]
        assert done.exit_code == 1
        assert done.err == f"error: set: {name}: the command has an option for it\n"
    assert not (tmp_path / "x").exists()


def test_an_unknown_size_is_named(run: Command, data: Path, tmp_path: Path) -> None:
    done = run("train", "ml1m", "--data", data, "--out", tmp_path / "x", "--size", "7b")
    assert done.exit_code == 1
    assert "size: should be one of 0.07m, 0.16m" in done.err


def test_a_size_and_a_checkpoint_are_bad_usage(
    run: Command, data: Path, model: Path, tmp_path: Path
) -> None:
    done = run(
        "train", "ml1m", "--data", data, "--out", tmp_path / "x", "--size", "1m", "--model", model
    )
    assert done.exit_code == 2


def test_a_plot_of_an_unknown_format_is_named_before_anything_is_scored(
    run: Command, data: Path, model: Path
) -> None:
    done = evaluate(run, data, "--model", model, "--plot", data / "x.doc")
    assert (done.exit_code, done.err) == (
        1,
        "error: plot: should end in .png, .svg, .pdf, is x.doc\n",
    )


def test_data_without_a_column_are_named(
    run: Command, data: Path, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "valid.parquet"
    pl.read_parquet(data / "valid.parquet").drop("history_ids").write_parquet(broken)
    done = run(
        "evaluate",
        *("--train", data / "train.parquet", "--items", data / "items.parquet"),
        *("--data", broken, "--model", model),
    )
    assert done.exit_code == 1
    assert done.err.startswith("error: history_ids: should be a column")


def test_a_missing_dataset_is_named(run: Command, tmp_path: Path) -> None:
    done = run("train", "ml1m", "--data", tmp_path, "--out", tmp_path / "x")
    assert done.exit_code == 1
    assert "train.parquet" in done.err
