"""``rankonce suite`` writes its report, says what it could not measure, and tells bad usage."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.cli.conftest import Run, write_lines
from tests.conftest import build_request

Command = Callable[..., Run]
FAST = ("--num-resamples", "10", "--in-context", "2", "--history", "0", "--no-titles")


@pytest.fixture(scope="module")
def labelled() -> list[dict[str, Any]]:
    """Give labelled requests of two tasks, a second apart."""
    made = []
    for seed in range(24):
        request = asdict(build_request(4, seed=seed))
        labels = [("Yes", "No")[(seed + place // 2) % 2] for place in range(4)]
        made.append({**request, "time": 1_000_000_000 + seed, "labels": labels})
    for one in made[::2]:
        one["task"] = "movie-rating"
        one["labels"] = ["1", "4", "2", "5"]
        one["profile"] = {"num_ratings": 3}
        one["history"] = []
    return [json.loads(json.dumps(one)) for one in made]


def test_files_of_labelled_requests_are_measured(
    run: Command, model: Path, labelled: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "examples.jsonl", labelled)
    out = tmp_path / "report"
    options = ("--late-share", "0.5", "--trained-on", "movie-rating", *FAST)
    done = run("suite", "--model", model, "--examples", path, "--out", out, *options)
    assert done.exit_code == 0
    assert done.err.endswith(f"report: {out / 'report.html'}\n")
    lines = [line for line in done.out.splitlines() if line.strip().startswith("movie-")]
    assert [line.split()[:2] for line in lines] == [["movie-rating", "T1"], ["movie-like", "T2"]]
    record = json.loads((out / "suite.json").read_text())
    assert record["trained_on"] == ["movie-rating"]
    assert [task["num_requests"] for task in record["tasks"]] == [6, 6]
    for task in record["tasks"]:
        assert task["asked"][0] >= 1_000_000_012
        assert {arm["name"] for arm in task["arms"]} == {"as it is", "2 examples", "0 events"}
        assert "truth" not in task["rankers"]
    assert "movie-rating" in (out / "report.html").read_text(encoding="utf-8")
    assert pl.read_parquet(out / "suite.parquet").height > 40


def test_a_simulated_task_needs_no_files(run: Command, model: Path, tmp_path: Path) -> None:
    options = ("--task", "song-next", "--limit", "4", *FAST)
    done = run("suite", "--model", model, "--out", tmp_path, *options)
    assert done.exit_code == 0
    (task,) = json.loads((tmp_path / "suite.json").read_text())["tasks"]
    # The folder of the model has no run record.
    assert (task["task"], task["group"], task["num_requests"]) == ("song-next", "unknown", 4)
    assert set(task["rankers"]) == {"ranker", "popularity", "trees", "truth"}


def test_a_task_that_fails_is_reported_and_the_exit_code_says_so(
    run: Command, model: Path, labelled: list[dict[str, Any]], tmp_path: Path
) -> None:
    broken = [dict(one) for one in labelled]
    broken[-1] = {**broken[-1], "labels": ["Yes", "Maybe", "No", "No"]}
    path = write_lines(tmp_path / "examples.jsonl", broken)
    done = run("suite", "--model", model, "--examples", path, "--out", tmp_path / "r", *FAST)
    assert done.exit_code == 1
    assert "failed: movie-like: labels[1]: should be one of Yes, No to be measured" in done.err
    record = json.loads((tmp_path / "r" / "suite.json").read_text())
    assert [bool(task["failure"]) for task in record["tasks"]] == [False, True]
    assert record["tasks"][0]["rankers"]["ranker"]["concordance"]["value"] is not None
    assert "labels[1]: should be one of" in (tmp_path / "r" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--examples", "EXAMPLES", "--data", "DATA"), 2, "is instead of --data"),
        (("--in-context", "two"), 2, "should be numbers like 2,8"),
        (("--in-context", "0,2"), 1, "error: examples: should be different numbers from 1"),
        (("--late-share", "0"), 1, "error: late_share: should lie in (0, 1], not 0.0"),
        (("--task", "movie-like"), 1, "error: task: movie-like: needs ml-latest-small"),
        (("--task", "song-skip"), 1, "error: task: song-skip: there is no data of this task"),
        (("--data", "DATA"), 1, "should hold ratings.parquet, qrels.parquet or manifest.json"),
        (
            ("--task", "song-next", "--trained-on", "movie-like,song-skip"),
            1,
            "error: trained-on: no task is called song-skip",
        ),
    ],
)
def test_bad_usage_is_told_before_anything_is_scored(
    run: Command,
    model: Path,
    labelled: list[dict[str, Any]],
    tmp_path: Path,
    options: tuple[str, ...],
    exit_code: int,
    message: str,
) -> None:
    places = {
        "EXAMPLES": write_lines(tmp_path / "examples.jsonl", labelled),
        "DATA": tmp_path,
    }
    given = [places.get(option, option) for option in options]
    done = run("suite", "--model", model, "--out", tmp_path / "report", *given)
    assert done.exit_code == exit_code
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "report").exists()
