"""rankonce tasks: the table, one task, an example, a check."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rankonce.prompts.tasks import Task, library_tasks
from tests.cli.conftest import Run

Command = Callable[..., Run]
OWN_TASK = {
    "name": "song-skip",
    "version": 7,
    "description": "Will the listener skip this song?",
    "instruction": "You predict what a listener skips.",
    "candidate": {"fields": {"title": {"required": True}}, "lines": ["Song: {title}"]},
    "question": "Will the listener skip the song that follows? Answer Yes or No.",
    "labels": [{"name": "Yes"}, {"name": "No"}],
    "ranking": {"kind": "log_odds", "label": "No"},
}


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    path = tmp_path / "song-skip.yaml"
    path.write_text(yaml.safe_dump(OWN_TASK))
    return path


def test_the_table_has_a_row_for_every_task(run: Command, own_task: Path) -> None:
    done = run("tasks", "--task-file", own_task)
    head, *rows = done.out.splitlines()
    assert (done.exit_code, done.err) == (0, "")
    assert head.split() == ["name", "version", "question", "labels", "ranking", "value",
                            "required", "fields"]  # fmt: skip
    assert [row.split()[0] for row in rows] == [*library_tasks(), "song-skip"]
    rating = next(row for row in rows if "movie-rating" in row)
    assert "1 2 3 4 5" in rating
    assert "expected grade" in rating
    assert rating.rstrip().endswith("history.title, candidate.title")
    assert rows[-1].split()[1] == "7"
    assert "log-odds of No" in rows[-1]


@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_a_task_is_shown_as_its_yaml_and_an_example(run: Command, name: str) -> None:
    text, example = run("tasks", name).out.split("# A request for it:\n")
    assert Task.model_validate(yaml.safe_load(text)) == library_tasks()[name]
    shown = json.loads(example)
    assert shown["task"] == name
    assert json.loads(run("tasks", name, "--example").out) == shown


@pytest.mark.parametrize("name", [*sorted(library_tasks()), "song-skip"])
def test_the_example_of_a_task_is_scored(
    run: Command, model: Path, own_task: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = run("tasks", name, "--example", "--task-file", own_task).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(example.encode())))
    (record,) = run("score", "-", "--model", model, "--task-file", own_task).records
    assert [candidate["id"] for candidate in record["candidates"]] == ["a", "b"]


def test_a_good_task_file_passes_the_check(run: Command, own_task: Path) -> None:
    done = run("tasks", "--check", own_task)
    assert (done.exit_code, done.out) == (0, f"{own_task}: task song-skip, version 7, is valid\n")


def test_a_fault_in_a_task_file_fails_the_check(run: Command, own_task: Path) -> None:
    own_task.write_text(yaml.safe_dump({**OWN_TASK, "labels": [{"name": "Yes"}]}))
    done = run("tasks", "--check", own_task)
    assert (done.exit_code, done.out) == (1, "")
    assert done.err.startswith(f"error: {own_task}: labels: ")


def test_an_unknown_task_is_refused_with_those_that_exist(run: Command) -> None:
    done = run("tasks", "song-skip")
    assert done.exit_code == 1
    assert "no task is called 'song-skip'; there are job-apply" in done.err


def test_an_example_needs_the_name_of_a_task(run: Command) -> None:
    assert run("tasks", "--example").exit_code == 2
