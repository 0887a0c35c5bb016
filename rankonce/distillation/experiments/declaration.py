"""The file of an experiment: what is run with which settings, and what decides."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rankonce.errors import ExperimentError
from rankonce.evaluation.weighted_metrics import METRICS
from rankonce.records import describe_faults

Value = str | int | float | bool | None
_VALUE: TypeAdapter[Value] = TypeAdapter(Value)
# Columns of every table beside the file's own.
FIXED_COLUMNS = ("id", "run", "seconds", "commit", "variables", "failure")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Where a step writes, and where a measure may put the scores of single rows.
OUT, SCORES = "out", "scores"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"should be one of {', '.join(METRICS)}, is {name!r}")
    return name


Metric = Annotated[str, AfterValidator(_check_metric)]


class Rule(_Strict):
    """What would be believed, written down before it is measured.

    Attributes:
        run, against: names of runs, compared at every setting of the grid, and all together.
        where: only settings with these values of the grid.
        metric: of ``scores``, such as ``auc``.
        above: holds if the whole 95 % interval of the difference lies above this.
        within: holds if the whole 90 % interval lies nearer to 0 than this (two one-sided tests at
            5 %: Schuirmann 1987).
    """

    name: str
    run: str
    against: str
    where: Mapping[str, Value] = Field(default_factory=dict)
    metric: Metric = "auc"
    above: float | None = None
    within: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_test(self) -> "Rule":
        if (self.above is None) == (self.within is None):
            raise ValueError("should have either above or within")
        return self


class Plot(_Strict):
    """One picture: a column against another, a line for every value of a third.

    Attributes:
        against: a run whose y is subtracted, setting by setting of the grid.
        runs: that are shown; all by default.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    x: str
    y: str
    by: str = "run"
    against: str | None = None
    runs: Sequence[str] = ()
    title: str = ""


class Experiment(_Strict):
    """The file of an experiment.

    Attributes:
        question: what it is to answer.
        inputs: files and folders, beside the experiment's file; changed contents change the steps
            that read them.
        variables: default values, which may name other variables and steps in braces.
        steps: commands by name: ``train ml1m --data {data} --out {out}``.
        measures: commands that print JSON; ``{scores}`` is a Parquet file of single rows that
            comparisons need: user_id, label, score.
        alone: steps and measures that run when nothing else does, as what is timed should.
        columns: numbers of the table by name, each a path into a measure:
            ``quality.metrics.0.metrics.auc``.
        runs: variables and inputs that a run sets, with its ``name``.
        grid: values of variables and inputs; every run is made with every combination.
        compare: the measure whose ``{scores}`` are compared.
        baseline: the run that the others are compared with, by ``metric``.
        rules: see ``Rule``.
    """

    name: str
    question: str = ""
    inputs: Mapping[str, str] = Field(default_factory=dict)
    variables: Mapping[str, Value] = Field(default_factory=dict)
    steps: Mapping[str, str] = Field(default_factory=dict)
    measures: Mapping[str, str] = Field(min_length=1)
    alone: Sequence[str] = ()
    columns: Mapping[str, str] = Field(default_factory=dict)
    runs: Sequence[Mapping[str, Value]] = Field(default=({"name": "only"},), min_length=1)
    grid: Mapping[str, Sequence[Value]] = Field(default_factory=dict)
    compare: str | None = None
    baseline: str | None = None
    metric: Metric = "auc"
    rules: Sequence[Rule] = ()
    plots: Sequence[Plot] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        names = [str(run.get("name") or "") for run in self.runs]
        if "" in names or len(set(names)) < len(names):
            raise ValueError("runs: each should have a name of its own")
        for group in ("inputs", "variables", "steps", "measures", "columns", "grid"):
            for name in getattr(self, group):
                if not _NAME.fullmatch(name) or name in (OUT, SCORES, "name", "run"):
                    raise ValueError(
                        f"{group}: {name!r} should be a word of a-z, 0-9 and _, and not "
                        f"{OUT}, {SCORES}, name or run"
                    )
        names_of = [*self.inputs, *self.variables, *self.steps]
        if twice := sorted({name for name in names_of if names_of.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: should be an input, a variable or a step")
        for name in {key for run in self.runs for key in run if key != "name"} | set(self.grid):
            if name not in self.variables and name not in self.inputs:
                raise ValueError(
                    f"runs: set {name!r}, which is no variable; there are "
                    f"{', '.join([*self.inputs, *self.variables]) or 'none'}"
                )
        for run in self.runs:
            for name in (key for key in run if key in self.grid):
                raise ValueError(f"runs: {run['name']}: should not set {name}, the grid does")
        for name, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{name}: should hold at least one value")
        for name in self.alone:
            if name not in {**self.steps, **self.measures}:
                raise ValueError(f"alone: should name steps or measures, has {name!r}")
        for name, path in self.columns.items():
            if path.partition(".")[0] not in self.measures:
                raise ValueError(f"columns.{name}: should begin with a measure, is {path!r}")
        if self.compare is not None and self.compare not in self.measures:
            raise ValueError(f"compare: should be a measure, is {self.compare!r}")
        if (self.baseline is not None or self.rules) and self.compare is None:
            raise ValueError("compare: should name the measure whose scores are compared")
        if self.compare is not None and f"{{{SCORES}}}" not in self.measures[self.compare]:
            raise ValueError(f"measures.{self.compare}: should write {{{SCORES}}}, to be compared")
        there = (*FIXED_COLUMNS, *self.grid, *self.columns)
        for plot in self.plots:
            for name in (plot.x, plot.y, plot.by):
                if name not in there:
                    raise ValueError(
                        f"plots.{plot.name}: {name!r} should be a column, of {', '.join(there)}"
                    )
        for rule in self.rules:
            for name, value in rule.where.items():
                if value not in self.grid.get(name, ()):
                    raise ValueError(
                        f"rules: {rule.name}: where should name values of the grid, has "
                        f"{name}={value!r}"
                    )
        wanted = [self.baseline, *(plot.against for plot in self.plots)]
        wanted += [one for rule in self.rules for one in (rule.run, rule.against)]
        wanted += [one for plot in self.plots for one in plot.runs]
        for name in wanted:
            if name is not None and name not in names:
                raise ValueError(f"no run is called {name!r}; there are {', '.join(names)}")
        return self


def read_experiment(path: Path, *, settings: Sequence[str] = ()) -> Experiment:
    """Read an experiment's file.

    Args:
        settings: ``NAME=VALUE`` for variables and inputs, in place of the file's defaults.

    Raises:
        ExperimentError: names the field and what would be right.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ExperimentError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ExperimentError(f"{path}: should hold name, measures and what they need")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {describe_faults(error.errors())}") from error
    inputs, variables = dict(experiment.inputs), dict(experiment.variables)
    for setting in settings:
        # Of every run, so that it would change nothing.
        if setting.partition("=")[0] in experiment.grid:
            raise ExperimentError(f"set: {setting!r}: the grid has its values; change these there")
        name, given, text = setting.partition("=")
        if not given or name not in {**inputs, **variables}:
            raise ExperimentError(
                f"set: should be NAME=VALUE with one of {', '.join([*inputs, *variables])}, "
                f"is {setting!r}"
            )
        if name in inputs:
            # As the shell understands it, from where the command is run.
            inputs[name] = str(Path(text).absolute())
        else:
            try:
                variables[name] = _VALUE.validate_python(yaml.safe_load(text))
            except (yaml.YAMLError, ValidationError) as error:
                raise ExperimentError(
                    f"set: {name}: should be a text, a number, true, false or null, is {text!r}"
                ) from error

    def place(name: str, value: Value) -> Value:
        return str(path.parent / str(value)) if name in inputs else value

    return experiment.model_copy(
        update={
            "inputs": {name: str(path.parent / text) for name, text in inputs.items()},
            "variables": variables,
            "runs": [
                {name: place(name, one) for name, one in run.items()} for run in experiment.runs
            ],
            "grid": {
                name: [place(name, one) for one in values]
                for name, values in experiment.grid.items()
            },
        }
    )
