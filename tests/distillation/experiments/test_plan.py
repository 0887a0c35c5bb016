import shutil
from pathlib import Path

import pytest
import yaml

from rankonce.distillation.experiments.declaration import Experiment, read_experiment
from rankonce.distillation.experiments.plan import plan_experiment
from rankonce.errors import ExperimentError

CONTENT = {
    "name": "sizes",
    "inputs": {"data": "films"},
    "variables": {"seed": 1, "keep": 0.5, "model": "{small}", "fast": None},
    "steps": {
        "teacher": "train ml1m --data {data} --seed {seed} --out {out}",
        "small": "prune {teacher} --keep {keep} --out {out}",
    },
    "measures": {"quality": "evaluate --model {model} --scores {scores} --json --keep {fast}"},
    "columns": {"auc": "quality.metrics.0.metrics.auc"},
    "runs": [{"name": "teacher", "model": "{teacher}"}, {"name": "half"}],
    "grid": {"seed": [1, 2]},
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "file.yaml"
    (folder / "films").write_text("films")
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


def read(folder: Path, **changes: object) -> Experiment:
    return read_experiment(write(folder, **changes))


def test_only_steps_that_a_run_needs_are_planned_and_each_once(tmp_path: Path) -> None:
    plan = plan_experiment(read(tmp_path))
    assert [(run.name, dict(run.settings)) for run in plan.runs] == [
        ("teacher", {"seed": 1}),
        ("half", {"seed": 1}),
        ("teacher", {"seed": 2}),
        ("half", {"seed": 2}),
    ]
    names = [step.name for step in plan.steps.values()]
    assert sorted(names) == ["quality"] * 4 + ["small"] * 2 + ["teacher"] * 2


def test_a_changed_variable_changes_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    before = plan_experiment(read(tmp_path)).steps
    path = write(tmp_path)
    after = plan_experiment(read_experiment(path, settings=["keep=0.25"])).steps
    assert {step.name for key, step in before.items() if key in after} == {"teacher", "quality"}
    changed = [step for key, step in after.items() if key not in before]
    assert sorted(step.name for step in changed) == ["quality", "quality", "small", "small"]
    assert all("0.25" in step.command for step in changed if step.name == "small")


def test_an_input_whose_path_begins_another_s_does_not_hide_it(tmp_path: Path) -> None:
    changes = {
        "inputs": {"data": "films", "test": "films.test", "short": "f"},
        "measures": {"quality": "evaluate --model {model} --data {test} {short} --json"},
    }
    (tmp_path / "films.test").write_text("one")
    (tmp_path / "f").write_text("f")

    def measures() -> set[str]:
        steps = plan_experiment(read(tmp_path, **changes)).steps
        return {digest for digest, step in steps.items() if step.kind == "measure"}

    before = plan_experiment(read(tmp_path, **changes)).steps
    commands = [step.command for step in before.values() if step.kind == "measure"]
    assert all(str(tmp_path / "films.test") in command for command in commands)
    first = measures()
    (tmp_path / "films.test").write_text("two")
    assert not first & measures()


def test_what_an_input_holds_makes_the_step_and_not_where_it_lies(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "films").mkdir(parents=True)
        (folder / "films" / "train").write_text("one")
        (folder / "file.yaml").write_text(yaml.safe_dump(CONTENT))

    def steps(folder: Path) -> set[str]:
        return set(plan_experiment(read_experiment(folder / "file.yaml")).steps)

    assert steps(first) == steps(second)
    (second / "films" / "train").write_text("two")
    assert not steps(first) & steps(second)
    shutil.rmtree(second / "films")
    with pytest.raises(ExperimentError, match=r"inputs.data: .*films cannot be read"):
        steps(second)


@pytest.mark.parametrize(
    ("value", "end"),
    [(None, ("--json",)), (False, ("--json",)), (True, ("--json", "--keep")), (7, ("--keep", "7"))],
)
def test_an_option_without_a_value_is_left_out(
    tmp_path: Path, value: object, end: tuple[str, ...]
) -> None:
    variables = {**CONTENT["variables"], "fast": value}  # type: ignore[dict-item]
    plan = plan_experiment(read(tmp_path, variables=variables))
    step = plan.steps[plan.runs[0].measures["quality"]]
    assert step.command[-len(end) :] == end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": {"a": "prune {b} --out {out}", "b": "prune {a} --out {out}"},
          "variables": {"model": "{a}", "seed": 1, "fast": 1}, "inputs": {},
          "runs": [{"name": "x"}]}, "circle: a → b → a"),
        ({"measures": {"quality": "evaluate --model {modle}"}}, "{modle} is neither a variable"),
        ({"steps": {"small": "prune x", "teacher": "train --out {out}"}},
         "small: should write to {out}"),
        ({"measures": {"quality": "evaluate 'x"}}, "No closing quotation"),
        ({"measures": {"quality": "evaluate --model a{fast}"}}, "stands inside of a word"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message.replace("{", r"\{")):
        plan_experiment(read(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "each should have a name of its own"),
        ({"runs": [{"name": "a", "kep": 1}]}, "set 'kep', which is no variable"),
        ({"grid": {"seed": []}}, "grid.seed: should hold at least one value"),
        ({"columns": {"auc": "qualty.auc"}}, "columns.auc: should begin with a measure"),
        ({"baseline": "half"}, "compare: should name the measure"),
        ({"compare": "quality", "baseline": "hlf"}, "no run is called 'hlf'"),
        ({"alone": ["speed"]}, "alone: should name steps or measures, has 'speed'"),
        (
            {"plots": [{"name": "p", "x": "seed", "y": "auc", "against": "hlf"}]},
            "no run is called 'hlf'",
        ),
        ({"plots": [{"name": "p", "x": "seed", "y": "auc", "runs": ["hlf"]}]}, "no run is called"),
        ({"compare": "quality", "rules": [{"name": "r", "run": "half", "against": "teacher"}]},
         "either above or within"),
        ({"compare": "quality", "rules": [{"name": "r", "run": "half", "against": "teacher",
                                           "above": 0, "where": {"seed": 3}}]},
         "r: where should name values of the grid, has seed=3"),
        ({"steps": {"Small": "prune x"}}, "should be a word of a-z"),
        ({"steps": {"seed": "prune x"}}, "seed: should be an input, a variable or a step"),
        ({"measurs": {}}, "measurs: unknown field"),
        ({"metric": "acu"}, "metric: should be one of auc, uauc"),
        ({"compare": "quality", "rules": [{"name": "r", "run": "half", "against": "teacher",
                                           "above": 0, "metric": "acu"}]},
         r"rules\[0\].metric: should be one of auc, uauc"),
        ({"compare": "quality", "measures": {"quality": "evaluate --model {model}"}},
         r"measures.quality: should write \{scores\}"),
        ({"plots": [{"name": "sizes", "x": "keep", "y": "auc"}]},
         "plots.sizes: 'keep' should be a column, of id, run, seconds, commit, variables, failure"),
        ({"runs": [{"name": "half", "seed": 3}]}, "runs: half: should not set seed, the grid does"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, **changes)


def test_unknown_commands_and_options_are_refused_before_anything_runs(tmp_path: Path) -> None:
    known = {
        "train": frozenset({"--data", "--seed", "--out"}),
        "prune": frozenset({"--keep", "--out"}),
        "evaluate": frozenset({"--model", "--scores", "--json", "--keep"}),
    }
    plan_experiment(read(tmp_path), commands=known)
    with pytest.raises(ExperimentError, match="rankonce prune has no option --keep"):
        plan_experiment(read(tmp_path), commands={**known, "prune": frozenset({"--out"})})
    del known["train"]
    with pytest.raises(ExperimentError, match="should begin with a command of rankonce"):
        plan_experiment(read(tmp_path), commands=known)


def test_settings_change_variables_alone(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ExperimentError, match="set: 'seed=3': the grid has its values"):
        read_experiment(path, settings=["seed=3"])
    with pytest.raises(ExperimentError, match="set: keep: should be a text, a number, true"):
        read_experiment(path, settings=["keep=[0.5"])
    assert read_experiment(path, settings=["keep=0.25"]).variables["keep"] == 0.25
    with pytest.raises(ExperimentError, match="set: should be NAME=VALUE with one of data"):
        read_experiment(path, settings=["kep=1"])
