"""``rankonce simulate``, ``evaluate --examples`` and ``experiment``, from nothing to verdicts."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from rankonce.evaluation.metrics import auc
from rankonce.ranker import Ranker
from rankonce.training.data import read_examples
from tests.cli.conftest import Run

Command = Callable[..., Run]
TASK = "song-newcomer"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("songs")


def simulate(run: Command, path: Path, part: str, *arguments: str) -> list[dict[str, object]]:
    done = run(
        "simulate", TASK, "--requests", 400, "--part", part, "--out", path, *arguments
    )  # fmt: skip
    assert (done.exit_code, done.out) == (0, ""), done.err
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_simulated_requests_are_cut_by_time_and_always_the_same(
    run: Command, tmp_path: Path
) -> None:
    parts = {name: simulate(run, tmp_path / name, name) for name in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 400
    times = {name: [float(str(row["time"])) for row in rows] for name, rows in parts.items()}
    assert max(times["train"]) < min(times["valid"])
    assert max(times["valid"]) < min(times["test"])
    assert len(parts["train"]) > 200
    assert simulate(run, tmp_path / "again", "test") == parts["test"]
    bare = simulate(run, tmp_path / "bare", "test", "--labels", "none")
    assert {label for row in bare for label in row["labels"]} == {None}  # type: ignore[attr-defined]
    true = simulate(run, tmp_path / "true", "test", "--labels", "truth")
    drawn = np.array([[label == "Yes" for label in row["labels"]] for row in parts["test"]])  # type: ignore[attr-defined]
    truth = np.array([[label["Yes"] for label in row["labels"]] for row in true])  # type: ignore[attr-defined]
    # Labels are drawn from the truth: it predicts them, and its mean is theirs.
    assert auc(drawn.ravel(), truth.ravel()) > 0.7
    assert truth.mean() == pytest.approx(drawn.mean(), abs=4 * 0.5 / drawn.size**0.5)


def test_the_newest_events_of_a_history_are_kept(run: Command, tmp_path: Path) -> None:
    def histories(*arguments: object) -> list[list[object]]:
        given = ("simulate", "song-next", "--requests", 40, "--out", tmp_path / "songs.jsonl")
        done = run(*given, *arguments)
        assert done.exit_code == 0, done.err
        rows = map(json.loads, (tmp_path / "songs.jsonl").read_text().splitlines())
        return [row["history"] for row in rows]

    whole = histories()
    assert max(map(len, whole)) > 3
    assert histories("--history", 3) == [events[-3:] for events in whole]
    assert histories("--history", 0) == [[] for _ in whole]


def test_a_task_without_a_simulator_is_refused(run: Command, tmp_path: Path) -> None:
    done = run("simulate", "movie-like", "--out", tmp_path / "x")
    assert done.exit_code == 1
    assert "task: should be one of job-apply" in done.err


def test_requests_of_any_task_are_measured_with_the_scores_of_every_candidate(
    run: Command, model: Path, tmp_path: Path
) -> None:
    simulate(run, tmp_path / "test.jsonl", "test")
    scores = tmp_path / "scores.parquet"
    given = ("--model", model, "--examples", tmp_path / "test.jsonl", "--num-resamples", 20)
    done = run("evaluate", *given, "--json", "--scores", scores)
    assert done.exit_code == 0, done.err
    record = json.loads(done.out)
    (row,) = record["metrics"]
    table = pl.read_parquet(scores)
    examples = read_examples(tmp_path / "test.jsonl")
    values = [
        np.exp(candidate.log_probs["Yes"])
        for example in examples
        for candidate in Ranker.from_pretrained(model).score(example.request).candidates
    ]
    labels = [label == "Yes" for example in examples for label in example.labels]
    np.testing.assert_allclose(table["score"], values, atol=1e-5)
    assert table["label"].to_list() == labels
    assert row["metrics"]["auc"] == pytest.approx(auc(labels, values), abs=1e-4)
    assert row["metrics"]["candidates"] == len(labels)
    assert Counter(table["user_id"].to_list()) == Counter(
        number for number, example in enumerate(examples) for _ in example.labels
    )
    assert record["tokens"]["separate_tokens"] > record["tokens"]["computed_tokens"] > 0

    twin = tmp_path / "twin"
    twin.symlink_to(model)
    both = json.loads(run("evaluate", *given, "--also", twin, "--json").out)
    (difference,) = both["differences"]
    assert difference["name"] == f"{TASK}: auc of {model.name} against twin"
    assert set(difference["metrics"].values()) == {0.0}


def test_evaluate_wants_tables_or_examples(run: Command, tmp_path: Path) -> None:
    simulate(run, tmp_path / "test.jsonl", "test")
    assert "--train, --items and --data are needed together" in run("evaluate").err
    both = run("evaluate", "--examples", tmp_path / "test.jsonl", "--plot", tmp_path / "x.png")
    assert (both.exit_code, "is instead of tables" in both.err) == (2, True)
    simulate(run, tmp_path / "none.jsonl", "test", "--labels", "none")
    done = run("evaluate", "--examples", tmp_path / "none.jsonl")
    assert (done.exit_code, done.err) == (
        1,
        "error: labels: should be hard for one candidate at least\n",
    )


def test_a_request_that_cannot_be_scored_is_named(
    run: Command, model: Path, tmp_path: Path
) -> None:
    rows = simulate(run, tmp_path / "test.jsonl", "test")
    rows[1]["candidates"][0]["fields"]["title"] = "x " * 9000  # type: ignore[index]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("evaluate", "--model", model, "--examples", tmp_path / "long.jsonl")
    assert done.exit_code == 1
    assert done.err.startswith("error: request 2: candidates[0]: the prompt has")


def test_what_cannot_be_measured_is_counted_or_named_before_anything_is_scored(
    run: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = simulate(run, tmp_path / "test.jsonl", "test")[:3]
    count = len(rows[1]["labels"])  # type: ignore[arg-type]
    rows[1]["labels"] = [{"Yes": 0.4, "No": 0.6}] * count
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("evaluate", "--model", model, "--num-resamples", 20, "--examples")
    done = run(*given, path)
    assert done.exit_code == 0, done.err
    assert f"{count} candidates without a hard label were left out" in done.err

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was scored")

    monkeypatch.setattr(Ranker, "score_many", refuse)
    lost = run(*given, path, "--scores", tmp_path / "nowhere" / "x.parquet")
    assert lost.exit_code == 1
    assert lost.err.endswith("nowhere should be a folder that is there\n")
    rows[2]["labels"] = ["Maybe"] * len(rows[2]["labels"])  # type: ignore[arg-type]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = run(*given, tmp_path / "test.jsonl", "--examples", path)
    assert wrong.exit_code == 1
    assert wrong.err == (
        f"error: {path}: line 3: labels: should be of Yes, No or null, has 'Maybe'\n"
    )


def test_an_experiment_trains_prunes_quantises_measures_and_judges(
    run: Command, tmp_path: Path
) -> None:
    simulate(run, tmp_path / "train.jsonl", "train")
    simulate(run, tmp_path / "test.jsonl", "test")
    file = tmp_path / "half.yaml"
    content = {
        "name": "half",
        "inputs": {"train": "train.jsonl", "test": "test.jsonl"},
        "variables": {"keep": 0.8, "model": "{small}"},
        "steps": {
            "teacher": "finetune --data {train} --size 0.07m --epochs 1 --out {out}",
            "small": "prune {teacher} --data {test} --keep {keep} --out {out}",
            "int8": "quantize {small} --to cpu-int8 --data {test} --keep-refused --out {out}",
        },
        "measures": {
            "quality": "evaluate --model {model} --examples {test} --json --scores {scores}",
            "speed": "bench rungs {teacher} {model} --data {test} --rounds 1 --json",
        },
        "alone": ["speed"],
        "columns": {
            "auc": "quality.metrics.0.metrics.auc",
            "size": "speed.rungs.1.weights_mb",
        },
        "runs": [
            {"name": "teacher", "model": "{teacher}"},
            {"name": "small"},
            {"name": "int8", "model": "{int8}"},
        ],
        "compare": "quality",
        "baseline": "teacher",
        "rules": [{"name": "as good", "run": "small", "against": "teacher", "within": 0.5}],
        "plots": [{"name": "quality", "x": "seconds", "y": "auc"}],
    }
    file.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    planned = run("experiment", file, "--out", out, "--dry-run")
    assert planned.exit_code == 0, planned.err
    assert [line.split()[3] for line in planned.out.splitlines()] == [
        *("teacher:", "quality:", "speed:"),
        *("small:", "quality:", "speed:"),
        *("int8:", "quality:", "speed:"),
    ]  # fmt: skip
    done = run("experiment", file, "--out", out)
    assert done.exit_code == 0, done.err
    assert "as good (within ±0.5): holds" in done.out
    table = pl.read_parquet(out / "results.parquet")
    assert table["run"].to_list() == ["teacher", "small", "int8"]
    assert table["auc"].is_between(0.3, 1).all()
    assert table["size"].is_sorted(descending=True)
    assert table["size"].n_unique() == 3
    report = json.loads((out / "report.json").read_text())
    difference = report["comparisons"][0]["estimate"]["value"]
    assert difference == pytest.approx(table["auc"][1] - table["auc"][0], abs=1e-9)
    # One line is another: what hangs on it is made anew, and the teacher is not.
    before = {path.parent for path in out.glob("steps/*/step.json")}
    file.write_text(yaml.safe_dump({**content, "variables": {**content["variables"], "keep": 0.6}}))
    changed = run("experiment", file, "--out", out)
    assert changed.exit_code == 0, changed.err
    made = {path.parent for path in out.glob("steps/*/step.json")} - before
    commands = [json.loads((path / "step.json").read_text())["command"] for path in made]
    assert sorted(command[1] for command in commands) == [
        *("bench", "bench", "evaluate", "evaluate", "prune", "quantize"),
    ]  # fmt: skip
    rows = pl.read_parquet(out / "results.parquet")
    smaller = rows.filter(~pl.col("id").is_in(table["id"].implode()))
    assert smaller["run"].to_list() == ["small", "int8"]
    assert (smaller["size"] < table["size"][1:]).all()
    again = run("experiment", file, "--out", out, "--set", "keep=2")
    assert again.exit_code == 1
    assert "failed: small" in again.err
    assert "keep: should" in again.err


def test_a_ladder_can_be_in_the_grid(run: Command, tmp_path: Path) -> None:
    simulate(run, tmp_path / "train.jsonl", "train")
    simulate(run, tmp_path / "test.jsonl", "test")
    rungs = [
        {"name": "large", "size": "0.16m"},
        {"name": "small", "size": "0.07m", "teacher": "first"},
    ]
    ladder = {"data": ["here"], "store": "scores.sqlite", "train": {"max_steps": 5}, "rungs": rungs}
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(ladder))
    content = {
        "name": "ladders",
        "inputs": {"ladder": "ladder.yaml", "train": "train.jsonl", "test": "test.jsonl"},
        "variables": {"steps": 5},
        "steps": {
            "climbed": "ladder {ladder} --set data=[{train}] --set store={out}/scores.sqlite "
            "--set rungs.small.train.max_steps={steps} --rounds 0 --out {out}"
        },
        "measures": {
            "quality": "evaluate --model {climbed}/rungs/2-small --examples {test} "
            "--num-resamples 20 --json --scores {scores}"
        },
        "columns": {"auc": "quality.metrics.0.metrics.auc"},
        "runs": [{"name": "small"}],
        "grid": {"steps": [3, 8]},
        "compare": "quality",
        "baseline": "small",
    }
    file = tmp_path / "ladders.yaml"
    file.write_text(yaml.safe_dump(content))
    done = run("experiment", file, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.err
    table = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert table["steps"].to_list() == [3, 8]
    taken = [
        json.loads(path.read_text())["rungs"][1]["steps"]
        for path in (tmp_path / "out").glob("steps/*/out/ladder.json")
    ]
    assert sorted(taken) == [3, 8]


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_that_comes_along_can_be_planned(
    run: Command, tmp_path: Path, file: Path
) -> None:
    (tmp_path / "input").write_text("anything")
    inputs = yaml.safe_load(file.read_text())["inputs"]
    given = [word for name in inputs for word in ("--set", f"{name}={tmp_path / 'input'}")]
    planned = run("experiment", file, *given, "--out", tmp_path / "out", "--dry-run")
    assert planned.exit_code == 0, planned.err
    runs, steps = (int(word) for word in planned.err.split() if word.isdigit())
    assert len(planned.out.splitlines()) == steps > runs
