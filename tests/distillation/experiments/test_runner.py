import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from openpyxl import load_workbook

from rankonce.distillation.experiments import queue, runner
from rankonce.distillation.experiments.declaration import Experiment
from rankonce.distillation.experiments.plan import Step, plan_experiment
from rankonce.distillation.experiments.queue import Device, Outcome, find_devices
from rankonce.distillation.experiments.runner import Report, run_experiment
from rankonce.errors import ExperimentError

PROGRAM = "steps:main"


@pytest.fixture(autouse=True)
def _steps_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of steps get the path of this one."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


def devices(folder: Path) -> list[Device]:
    return [Device(name=name, environment={"COUNT": f"{folder / 'count'}"}) for name in "ab"]


CONTENT: dict[str, Any] = {
    "name": "texts",
    "variables": {"text": "ab", "fail": None, "shift": 0.5, "seed": 1},
    "steps": {
        "base": "make base{seed} --out {out}",
        "made": "make '{text} of {base}' --out {out} --fail {fail}",
    },
    "measures": {"quality": "measure {made} --scores {scores} --shift {shift}"},
    "columns": {"length": "quality.parts.0.length"},
    "compare": "quality",
    "baseline": "plain",
    "runs": [{"name": "plain"}, {"name": "better", "text": "abc", "shift": 1.5}],
    "grid": {"seed": [1, 2]},
}  # fmt: skip


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate({**CONTENT, **changes})


def run(folder: Path, **changes: Any) -> Report:
    plan = plan_experiment(experiment(**changes))
    return run_experiment(plan, folder / "out", devices(folder), program=PROGRAM)


def test_shared_steps_run_once_and_every_run_gets_its_row(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert [(row["run"], row["seed"]) for row in report.rows] == [
        ("plain", 1), ("better", 1), ("plain", 2), ("better", 2),
    ]  # fmt: skip
    # base1 and base2 once each, made four times.
    assert len((tmp_path / "count").read_text().splitlines()) == 6
    table = pl.read_parquet(tmp_path / "out/results.parquet")
    assert table.height == 4
    assert table["failure"].is_null().all()
    lengths = dict(zip(table["id"], table["length"], strict=True))
    for row in report.rows:
        words = "ab" if row["run"] == "plain" else "abc"
        assert lengths[row["id"]] == row["length"] > len(words)


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path)
    calls = (tmp_path / "count").read_text()
    again = run(tmp_path)
    assert (tmp_path / "count").read_text() == calls
    assert again.rows == first.rows


def test_the_first_runs_end_first(tmp_path: Path) -> None:
    plan = plan_experiment(experiment())
    run_experiment(plan, tmp_path / "out", devices(tmp_path)[:1], program=PROGRAM)
    # Steps that other seeds need could run from the start, and wait until the first seed is done.
    order = [line.split()[0] for line in (tmp_path / "count").read_text().splitlines()]
    assert order == ["base1", "ab", "abc", "base2", "ab", "abc"]


def test_rows_of_before_stand_until_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    written = []

    def write(path: Path, rows: Any) -> None:
        written.append(len(rows))

    monkeypatch.setattr(runner, "write_parquet", write)
    run(tmp_path)
    assert written == [4, 4, 4, 4]


def test_a_ladder_that_was_cut_off_keeps_its_rungs(tmp_path: Path) -> None:
    plan = plan_experiment(experiment(grid={}, runs=[{"name": "plain"}]))
    (base,) = (digest for digest, step in plan.steps.items() if step.name == "base")
    rungs = tmp_path / "out" / "steps" / base / "out" / "rungs"
    rungs.mkdir(parents=True)
    # The test's own command does not go on, it finds the folder that a ladder would find.
    report = run_experiment(plan, tmp_path / "out", devices(tmp_path), program=PROGRAM)
    assert "FileExistsError" in report.failures[0]["failure"]
    assert rungs.is_dir()


def test_steps_run_on_the_gpus_that_were_given_and_on_none_in_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def visible(slots: int | None = None) -> list[str]:
        return [one.environment["CUDA_VISIBLE_DEVICES"] for one in find_devices(slots)]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible() == ["2", "3"]
    assert visible(3) == ["", "", ""]
    assert {one.environment["OMP_NUM_THREADS"] for one in find_devices(1000)} == {"1"}


def test_one_changed_line_runs_what_depends_on_it(tmp_path: Path) -> None:
    run(tmp_path)
    calls = len((tmp_path / "count").read_text().splitlines())
    runs = [{"name": "plain"}, {"name": "better", "text": "abcd", "shift": 1.5}]
    report = run(tmp_path, runs=runs)
    assert len((tmp_path / "count").read_text().splitlines()) == calls + 2
    assert report.rows[1]["length"] - report.rows[0]["length"] == 2


def test_a_failure_stops_only_its_own_runs_and_is_tried_again(tmp_path: Path) -> None:
    runs = [{"name": "plain"}, {"name": "broken", "fail": True}]
    report = run(tmp_path, runs=runs)
    assert [row["failure"] is None for row in report.rows] == [True, False, True, False]
    reason = report.failures[0]["failure"]
    assert "needs made, which failed: exited with 1" in reason
    assert "the disk is full" in reason
    mended = run(tmp_path, runs=[{"name": "plain"}, {"name": "broken"}])
    assert not mended.failures


def test_the_sheet_keeps_what_people_wrote_into_it(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "out/results.xlsx"
    book = load_workbook(path)
    sheet = book["runs"]
    column = sheet.max_column + 1
    sheet.cell(1, column, "remark")
    sheet.cell(3, column, "look at this again")
    book.create_sheet("notes")["A1"] = "mine"
    book.save(path)
    second = sheet.cell(3, 1).value
    runs = [{"name": "plain"}, {"name": "better", "shift": 1.5}, {"name": "=1+1", "text": "z"}]
    run(tmp_path, runs=runs)
    book = load_workbook(path)
    sheet = book["runs"]
    assert book["notes"]["A1"].value == "mine"
    assert sheet.cell(3, 1).value == second
    assert sheet.cell(3, column).value == "look at this again"
    # Four rows of before, two for "better" with another text, two new ones.
    assert sheet.max_row == 1 + 8
    heads = [cell.value for cell in sheet[1]]
    formula = sheet.cell(9, heads.index("run") + 1)
    assert (formula.value, formula.data_type) == ("=1+1", "s")


def test_rules_are_judged_over_all_settings(tmp_path: Path) -> None:
    rules = [
        {"name": "better", "run": "better", "against": "plain", "above": 0.0},
        {"name": "much better", "run": "better", "against": "plain", "above": 0.4},
        {"name": "the same", "run": "plain", "against": "plain", "within": 0.001},
        {"name": "not the same", "run": "better", "against": "plain", "within": 0.01},
        {"name": "once", "run": "better", "against": "plain", "above": 0, "where": {"seed": 2}},
    ]
    report = run(tmp_path, rules=rules)
    assert [verdict.holds for verdict in report.verdicts] == [True, False, True, False, True]
    settings = [verdict.comparison.settings for verdict in report.verdicts if verdict.comparison]
    assert settings == ["", "", "", "", "seed=2"]
    whole = report.comparisons[-1]
    assert (whole.run, whole.against, whole.settings) == ("better", "plain", "")
    assert [one.settings for one in report.comparisons] == ["seed=1", "seed=2", ""]
    # 1.5 against 0.5 standard deviations: AUC .856 against .638.
    assert whole.estimate.value == pytest.approx(0.218, abs=0.04)
    assert whole.estimate.low < whole.low_90 < whole.high_90 < whole.estimate.high
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert [one["holds"] for one in written["verdicts"]] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_the_baseline_is_compared_by_the_metric_that_the_file_names(tmp_path: Path) -> None:
    report = run(tmp_path, metric="uauc", grid={})
    (one,) = report.comparisons
    assert one.metric == "uauc"
    assert one.estimate.value > 0


def test_comparisons_say_how_far_they_are(tmp_path: Path) -> None:
    rules = [{"name": "r", "run": "better", "against": "plain", "metric": "uauc", "above": 0.0}]
    plan = plan_experiment(experiment(rules=rules))
    told: list[tuple[int, int]] = []
    run_experiment(
        plan,
        tmp_path / "out",
        devices(tmp_path),
        program=PROGRAM,
        compared=lambda done, of: told.append((done, of)),
    )
    # Two runs at two settings by AUC, and the same by UAUC for the rule.
    assert told == [(number, 8) for number in range(1, 9)]


def test_a_rule_without_all_its_runs_is_undecided(tmp_path: Path) -> None:
    runs = [{"name": "plain"}, {"name": "broken", "fail": True}]
    rules = [{"name": "r", "run": "broken", "against": "plain", "above": 0.0}]
    assert run(tmp_path, runs=runs, rules=rules).verdicts[0].holds is None


def test_rules_cannot_change_after_the_first_result(tmp_path: Path) -> None:
    rule = {"name": "r", "run": "better", "against": "plain", "above": 0.0}
    run(tmp_path, rules=[rule])
    with pytest.raises(ExperimentError, match="rules: should be what stood there before"):
        run(tmp_path, rules=[{**rule, "above": -1.0}])
    with pytest.raises(ExperimentError, match="metric: should be what stood there before"):
        run(tmp_path, rules=[rule], metric="uauc")
    # What may change is said as it was at first, and as it is now.
    run(tmp_path, rules=[rule], question="and now?")
    first = json.loads((tmp_path / "out/experiment.json").read_text())
    now = json.loads((tmp_path / "out/report.json").read_text())["experiment"]
    assert (first["question"], now["question"]) == ("", "and now?")
    with pytest.raises(ExperimentError, match="belongs to the experiment 'texts'"):
        run(tmp_path, rules=[rule], name="other")


def test_a_verdict_says_what_was_changed_since_the_first_result(tmp_path: Path) -> None:
    rules = [{"name": "r", "run": "better", "against": "plain", "above": 0.0}]
    assert run(tmp_path, rules=rules).changed == ()
    runs = [*CONTENT["runs"], {"name": "best", "shift": 2.5}]
    assert run(tmp_path, rules=rules, runs=runs, grid={"seed": [1, 2, 3]}).changed == ()
    variables = {**CONTENT["variables"], "shift": 0.1}
    runs = [{"name": "plain"}, {"name": "better", "text": "abc", "shift": 9.0}]
    report = run(tmp_path, rules=rules, variables=variables, runs=runs, grid={"seed": [2]})
    assert report.changed == ("variables", "runs", "grid")
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["changed"] == ["variables", "runs", "grid"]


def test_rows_of_other_settings_stay_and_say_what_was_set(tmp_path: Path) -> None:
    run(tmp_path, grid={})
    variables = {**CONTENT["variables"], "shift": 0.25}
    run(tmp_path, grid={}, variables=variables)
    table = pl.read_parquet(tmp_path / "out/results.parquet")
    shifts = [json.loads(one)["shift"] for one in table["variables"]]
    assert sorted(zip(table["run"], shifts, strict=True)) == [
        ("better", 1.5), ("plain", 0.25), ("plain", 0.5),
    ]  # fmt: skip


def test_a_row_names_the_commits_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(["aaa", "bbb", "ccc"])
    monkeypatch.setattr(queue, "describe_environment", lambda: {"commit": next(commits)})
    first = run(tmp_path, runs=[{"name": "plain"}], grid={})
    assert first.rows[0]["commit"] == "aaa, bbb, ccc"
    # Whoever runs it again has computed nothing.
    monkeypatch.setattr(queue, "describe_environment", lambda: {"commit": "ddd"})
    assert run(tmp_path, runs=[{"name": "plain"}], grid={}).rows == first.rows


def test_settings_may_have_rows_of_their_own(tmp_path: Path) -> None:
    measures = {"quality": "measure {made} --scores {scores} --shift {shift} --rows {rows}"}
    variables = {**CONTENT["variables"], "rows": 400}
    rules = [{"name": "r", "run": "better", "against": "plain", "above": 0.0}]
    report = run(
        tmp_path, measures=measures, variables=variables, grid={"rows": [400, 200]}, rules=rules
    )
    assert [one.settings for one in report.comparisons] == ["rows=400", "rows=200", ""]
    each = [one.estimate.value for one in report.comparisons]
    assert each[2] == pytest.approx((each[0] + each[1]) / 2)
    assert report.verdicts[0].holds


def test_what_is_timed_runs_alone(tmp_path: Path) -> None:
    steps = {"made": "make '{text}{seed}' --out {out} --sleep 0.3"}
    plan = plan_experiment(experiment(steps=steps, grid={"seed": [1, 2, 3]}, alone=["quality"]))
    spans: list[tuple[str, float, float]] = []
    began: dict[str, float] = {}
    whole = queue._run

    def watch(step: Step, *arguments: Any) -> Outcome:
        began[step.digest] = time.monotonic()
        outcome = whole(step, *arguments)
        spans.append((step.name, began[step.digest], time.monotonic()))
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "_run", watch)
        run_experiment(plan, tmp_path / "out", devices(tmp_path), program=PROGRAM)
    timed = [one for one in spans if one[0] == "quality"]
    assert len(timed) == 6
    for one in timed:
        assert all(end <= one[1] or start >= one[2] for _, start, end in spans if start != one[1])


def test_other_rows_cannot_be_compared(tmp_path: Path) -> None:
    measures = {"quality": "measure {made} --scores {scores} --rows {rows}"}
    variables = {"text": "ab", "fail": None, "rows": 400, "seed": 1}
    runs = [{"name": "plain"}, {"name": "better", "rows": 396}]
    with pytest.raises(ExperimentError, match="should be measured on the same rows"):
        run(tmp_path, measures=measures, variables=variables, runs=runs)


def test_a_column_that_is_not_printed_fails_its_row_and_says_what_is_there(tmp_path: Path) -> None:
    report = run(tmp_path, columns={"auc": "quality.parts.0.auc"})
    assert "'auc' is not in ['length', 'text']" in report.rows[0]["failure"]


def test_plots_are_drawn_from_the_table(tmp_path: Path) -> None:
    run(tmp_path, plots=[{"name": "lengths", "x": "seed", "y": "length"}])
    assert (tmp_path / "out/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_experiment_goes_on_and_shares_no_folder_with_a_step_that_lives(
    tmp_path: Path,
) -> None:
    steps = {
        "base": "make base --out {out}",
        "made": "make '{base}' --out {out} --sleep 6",
    }
    plan = plan_experiment(experiment(steps=steps, grid={}, runs=[{"name": "plain"}]))
    script = (
        "import sys; from pathlib import Path;"
        "sys.path.insert(0, sys.argv[1]);"
        "import test_runner as t;"
        "from rankonce.distillation.experiments.plan import plan_experiment;"
        "from rankonce.distillation.experiments.runner import run_experiment;"
        "folder = Path(sys.argv[2]);"
        f"e = t.experiment(steps={steps!r}, grid={{}}, runs=[{{'name': 'plain'}}]);"
        "run_experiment(plan_experiment(e), folder / 'out', t.devices(folder), program=t.PROGRAM)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ},
    )
    count = tmp_path / "count"
    deadline = time.monotonic() + 60
    while not count.exists() or len(count.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    # The step outlives its parent: nobody else may write into its folder meanwhile.
    with pytest.raises(ExperimentError, match="another process runs this step"):
        run_experiment(plan, tmp_path / "out", devices(tmp_path), program=PROGRAM)
    time.sleep(7)
    report = run_experiment(plan, tmp_path / "out", devices(tmp_path), program=PROGRAM)
    assert not report.failures
    # base was finished before the kill and is not made again.
    assert sum(line == "base" for line in count.read_text().splitlines()) == 1
