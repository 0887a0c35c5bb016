"""The adapter study: its table, its histories, and a whole small run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankonce.benchmarks.adapters import (
    TASKS,
    StudyOptions,
    build_examples,
    run_study,
    write_table,
)
from rankonce.prompts.tasks import library_tasks

ROW: dict[str, Any] = {
    "task": "post-like",
    "rows": 1200,
    "auc": {"backbone": 0.5, "adapter": 0.6, "continued": 0.45, "truth": 0.8},
    "auc_difference": {
        "adapter": {"value": 0.1, "standard_error": 0.02},
        "continued": {"value": -0.05, "standard_error": 0.01},
    },
}


def test_the_table_shows_each_arm_beside_the_backbone() -> None:
    assert write_table([ROW]).splitlines()[-1] == (
        "| post-like | 1,200 | 0.5000 | 0.6000 | +0.1000 ± 0.0200 | 0.4500 | -0.0500 ± 0.0100 "
        "| 0.8000 |"
    )


def test_the_tasks_answer_yes_or_no() -> None:
    assert {library_tasks()[task].label_names for task in TASKS.values()} == {("Yes", "No")}


def test_histories_keep_their_newest_events() -> None:
    whole, cut = (
        build_examples("music", StudyOptions(num_examples=30, num_requests=300, num_events=count))
        for count in (100, 2)
    )
    assert max(len(one.example.request.history) for one in whole) > 2
    for one, other in zip(whole, cut, strict=True):
        times = sorted(event.time for event in one.example.request.history)
        assert [event.time for event in other.example.request.history] == times[-2:]


@pytest.mark.slow
def test_a_small_study_measures_every_task_and_arm(tmp_path: Path) -> None:
    options = StudyOptions(
        num_examples=24,
        num_requests=200,
        epochs=1,
        adapter_epochs=1,
        output=tmp_path / "study.json",
    )
    table = run_study(options)
    record = json.loads(options.output.read_text())
    assert [row["task"] for row in record["rows"]] == list(TASKS.values())
    assert write_table(record["rows"]) == table
    for row in record["rows"]:
        assert row["auc"]["truth"] > 0.6
        assert row["auc"]["adapter"] != row["auc"]["backbone"] != row["auc"]["continued"]
