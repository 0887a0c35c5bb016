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
        (("--teacher", "nowhere", "--store", "x.sqlite"), 1, "error: "),
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
    assert [row.split(" | ")[0] for row in rows] == ["| large", "| middle", "| small"]
