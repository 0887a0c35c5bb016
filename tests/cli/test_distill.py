"""``rankonce distill`` and ``rankonce ladder`` from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.distillation.test_ladder import write_ladder
from tests.training.test_loop import write_examples

Command = Callable[..., Run]
_BUDGET = ("--set", "epochs=1", "--set", "targets_per_step=24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distil")
    write_examples(folder / "examples.jsonl", count=8)
    return folder


def test_a_student_is_distilled_and_the_second_costs_nothing(
    run: Command, folder: Path, model: Path, tmp_path: Path
) -> None:
    data, store = folder / "examples.jsonl", tmp_path / "scores.sqlite"
    common = (*_BUDGET, "--data", data, "--teacher", model, "--store", store)
    done = run("distill", *common, "--size", "0.07m", "--valid", data, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.err
    assert done.out == ""
    assert "teacher: 8 calls for 48 candidates" in done.err
    assert "Measured on held-out" in (tmp_path / "a" / "README.md").read_text()
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line.pop("labels")
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = run(
        *("distill", *common, "--size", "0.07m", "--unlabelled", more, "--out", tmp_path / "b"),
        *("--loss", "reverse-kl", "--loss", "log-odds-mse=0.1", "--target", "mixture"),
    )
    assert second.exit_code == 0, second.err
    assert "teacher: 0 calls for 0 candidates, 0 tokens, 0 s in this run" in second.err
    record = json.loads((tmp_path / "b" / "stages" / "1-distill" / "run.json").read_text())
    assert "'log-odds-mse': 0.1" in record["objective"]
    # A finished run is of one target and its losses.
    for other in (("--target", "two-logits"), ("--loss", "reverse-kl"), ("--temperature", "2")):
        again = run(
            *("distill", *common, "--size", "0.07m", "--unlabelled", more, "--out", tmp_path / "b"),
            *other,
        )
        assert again.exit_code == 1
        assert "holds a run with another objective" in again.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--loss", "hinge"), 1, "error: losses: should be of forward-kl"),
        (("--target", "softer"), 1, "error: target: should be one of hard, soft"),
        (("--temperature", "0"), 1, "error: temperature: should be above 0"),
        (("--set", "epoch=1"), 1, "error: set: a stage has the settings epochs"),
        (("--recipe", "ml2m"), 1, "error: recipe: should be one of ml1m"),
        ((), 1, "error: teacher: target 'soft' needs one"),
        (("--store", "x.sqlite"), 2, "belongs to --teacher"),
        (("--recipe", "ml1m", "--data", "."), 2, "should be the recipe's folder alone"),
        (
            ("--teacher", "x", "--store", "x.sqlite", "--concurrency", "3"),
            2,
            "should be a server's URL where",
        ),
        (
            ("--teacher", "nowhere", "--store", "x.sqlite"),
            1,
            "error: teacher: there is no folder nowhere, nor a repository that can be read: ",
        ),
        (
            ("--teacher", "./nowhere", "--store", "x.sqlite"),
            1,
            "error: teacher: there is no folder ./nowhere; should be a checkpoint's or a URL",
        ),
        (
            ("--teacher", "runs/of/nobody", "--store", "x.sqlite"),
            1,
            "error: teacher: there is no folder runs/of/nobody; should be",
        ),
        (("--teacher", "http://127.0.0.1:1", "--store", "x.sqlite"), 1, "http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_distilled_is_named(
    run: Command,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", folder / "examples.jsonl", "--out", tmp_path / "out")
    done = run("distill", *data, *options)
    assert done.exit_code == code
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_ladder_prints_its_table(run: Command, folder: Path, tmp_path: Path) -> None:
    path = write_ladder(folder, tmp_path)
    done = run("ladder", path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.err
    head, _, *rows = done.out.splitlines()
    assert head.startswith("| rung | parameters | teacher | movie-like auc |")
    assert head.endswith("| pass p50, ms | tokens/s | candidates/s | peak memory, MB |")
    assert [row.split(" | ")[0] for row in rows] == ["| large", "| middle", "| small"]
    kept = json.loads((tmp_path / "out" / "ladder.json").read_text())["rungs"]
    assert all(value > 0 for one in kept for value in one["speed"].values())
    plain = run("ladder", path, "--out", tmp_path / "out", "--rounds", "0")
    assert "tokens/s" not in plain.out


def test_a_ladder_without_its_teacher_begins_no_rung(
    run: Command, folder: Path, tmp_path: Path
) -> None:
    text = """
data: [examples.jsonl]
store: scores.sqlite
rungs:
  - {name: large, size: 0.07m}
  - {name: small, size: 0.07m, teacher: ./nowhere}
"""
    path = write_ladder(folder, tmp_path, text)
    done = run("ladder", path, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "error: teacher: there is no folder ./nowhere" in done.err
    assert not (tmp_path / "out").exists()


def _with_a_long_candidate(folder: Path, path: Path) -> Path:
    """Write the examples again, after a blank line, the second with one candidate more."""
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    lines[1]["candidates"].append({"fields": {"title": "Alien " * 5000}})
    lines[1]["labels"].append("Yes")
    path.write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_text_that_is_too_long_is_named_by_file_and_line(
    run: Command, folder: Path, model: Path, tmp_path: Path
) -> None:
    data = _with_a_long_candidate(folder, tmp_path / "long.jsonl")
    done = run("finetune", "--data", data, "--model", model, "--out", tmp_path / "a")
    assert done.exit_code == 1
    assert f"error: {data}: line 3: candidates[6]: the prompt has" in done.err
    hard = ("distill", "--target", "hard", "--loss", "forward-kl")
    done = run(*hard, "--data", data, "--model", model, "--out", tmp_path / "b")
    assert done.exit_code == 1
    assert f"error: {data}: line 3: candidates[6]: the prompt has" in done.err


def test_a_text_that_is_too_long_for_a_teacher_is_named_though_others_are_known(
    run: Command, folder: Path, model: Path, tmp_path: Path
) -> None:
    common = ("distill", *_BUDGET, "--teacher", model, "--store", tmp_path / "scores.sqlite")
    first = ("--data", folder / "examples.jsonl", "--size", "0.07m", "--out", tmp_path / "a")
    assert run(*common, *first).exit_code == 0
    # Of the second request the teacher is asked for the one candidate that it does not know yet.
    data = _with_a_long_candidate(folder, tmp_path / "long.jsonl")
    done = run(*common, "--data", data, "--model", model, "--out", tmp_path / "b")
    assert done.exit_code == 1
    assert f"error: {data}: line 3: the teacher: candidates[6]: the prompt has" in done.err
