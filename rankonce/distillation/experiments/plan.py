"""An experiment's file, and the steps of its runs.

A step is a command of ours that writes a folder, with variables and other steps' folders in braces;
a measure is one that prints JSON. A run sets variables. Only steps that a run's measures need are
run, so that a run which names the teacher where others name a pruned student prunes nothing, and
steps that say the same in several runs are one step.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

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

from rankonce import __version__
from rankonce.errors import ExperimentError
from rankonce.evaluation.weighted_metrics import METRICS
from rankonce.records import describe_faults

Value = str | int | float | bool | None
_VALUE: TypeAdapter[Value] = TypeAdapter(Value)
# Columns of every table beside the file's own.
FIXED_COLUMNS = ("id", "run", "seconds", "commit", "failure")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
# Where a step writes, and where a measure may put the scores of single rows.
_OUT, _SCORES = "out", "scores"


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
    """One picture: a column against another, a line for every value of a third."""

    name: str = Field(pattern=r"^[\w-]+$")
    x: str
    y: str
    by: str = "run"
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
                if not _NAME.fullmatch(name) or name in (_OUT, _SCORES, "name", "run"):
                    raise ValueError(
                        f"{group}: {name!r} should be a word of a-z, 0-9 and _, and not "
                        f"{_OUT}, {_SCORES}, name or run"
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
        for name, path in self.columns.items():
            if path.partition(".")[0] not in self.measures:
                raise ValueError(f"columns.{name}: should begin with a measure, is {path!r}")
        if self.compare is not None and self.compare not in self.measures:
            raise ValueError(f"compare: should be a measure, is {self.compare!r}")
        if (self.baseline is not None or self.rules) and self.compare is None:
            raise ValueError("compare: should name the measure whose scores are compared")
        if self.compare is not None and f"{{{_SCORES}}}" not in self.measures[self.compare]:
            raise ValueError(f"measures.{self.compare}: should write {{{_SCORES}}}, to be compared")
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
        wanted = [self.baseline] if self.baseline is not None else []
        for name in [*wanted, *(one for rule in self.rules for one in (rule.run, rule.against))]:
            if name not in names:
                raise ValueError(f"no run is called {name!r}; there are {', '.join(names)}")
        return self


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command that is run once, whichever runs need it.

    Attributes:
        name: in the file.
        digest: of the command with its needs' digests and its input files' contents.
        command: arguments, where ``{out}`` and ``{scores}`` are still to be filled in and a need
            stands as ``{digest}``.
        needs: digests of steps.
    """

    name: str
    kind: Literal["step", "measure"]
    digest: str
    command: tuple[str, ...]
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the table.

    Attributes:
        id: digest of all that it measures.
        settings: the values of the grid.
        variables: all, as the run has them.
        measures: digests by name.
    """

    id: str
    name: str
    settings: Mapping[str, Value]
    variables: Mapping[str, Value]
    measures: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs, and the steps that they need, each once and after what it needs."""

    experiment: Experiment
    runs: Sequence[Run]
    steps: Mapping[str, Step] = field(default_factory=dict)


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


def plan_experiment(
    experiment: Experiment, *, commands: Mapping[str, frozenset[str]] | None = None
) -> Plan:
    """Work out every run's steps.

    Args:
        commands: options by subcommand (``bench rungs`` is one); a step that calls another is
            refused before anything runs.

    Raises:
        ExperimentError: names the step or variable that does not exist, or goes in a circle.
    """
    steps: dict[str, Step] = {}
    fingerprint = _Fingerprints()
    runs = []
    for name, settings, variables in _expand(experiment):
        resolver = _Resolver(experiment, variables, steps, fingerprint, commands)
        measures = {
            measure: resolver.add(measure, command, "measure")
            for measure, command in experiment.measures.items()
        }
        runs.append(
            Run(
                id=_digest([name, dict(settings), measures]),
                name=name,
                settings=settings,
                variables=variables,
                measures=measures,
            )
        )
    return Plan(experiment=experiment, runs=runs, steps=steps)


def _expand(
    experiment: Experiment,
) -> Iterator[tuple[str, Mapping[str, Value], Mapping[str, Value]]]:
    # Settings first: what was cut short has all runs of some settings, which can be compared.
    for values in itertools.product(*experiment.grid.values()):
        settings = dict(zip(experiment.grid, values, strict=True))
        for run in experiment.runs:
            own = {key: value for key, value in run.items() if key != "name"}
            variables = {**experiment.inputs, **experiment.variables, **settings, **own}
            yield str(run["name"]), settings, variables


class _Fingerprints:
    """SHA-256 of files and folders, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, name: str, text: str) -> str:
        if text not in self._known:
            path = Path(text)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            hashed = hashlib.sha256()
            try:
                for one in (file for file in files if not file.is_dir()):
                    hashed.update(str(one.relative_to(path)).encode())
                    with one.open("rb") as file:
                        hashed.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ExperimentError(f"inputs.{name}: {text} cannot be read: {error}") from error
            self._known[text] = hashed.hexdigest()
        return self._known[text]


class _Resolver:
    """Fills in the braces of one run."""

    def __init__(
        self,
        experiment: Experiment,
        variables: Mapping[str, Value],
        steps: dict[str, Step],
        fingerprint: Callable[[str, str], str],
        commands: Mapping[str, frozenset[str]] | None,
    ) -> None:
        self._experiment = experiment
        self._variables = variables
        self._steps = steps
        self._fingerprint = fingerprint
        self._commands = commands
        self._open: list[str] = []
        self._inputs: dict[str, str] = {}

    def add(self, name: str, command: str, kind: Literal["step", "measure"]) -> str:
        """Add a step and what it needs; return its digest."""
        self._enter(name)
        needs: set[str] = set()
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ExperimentError(f"{name}: {command!r} cannot be read: {error}") from error
        arguments: list[str] = []
        for word in words:
            value = self._variables.get(word[1:-1], word) if _is_reference(word) else word
            if isinstance(value, bool) or value is None:
                # A switch stands without its value; one that is off, or has none, is left out.
                if not value and arguments and arguments[-1].startswith("--"):
                    arguments.pop()
            else:
                arguments.append(self._fill(word, needs, name))
        self._check(name, arguments)
        if kind == "step" and not any(f"{{{_OUT}}}" in word for word in arguments):
            raise ExperimentError(f"steps.{name}: should write to {{{_OUT}}}: {command!r}")
        # What an input holds counts, not where it lies.
        contents = list(arguments)
        for place, mark in self._inputs.items():
            contents = [word.replace(place, mark) for word in contents]
        digest = _digest([kind, contents, __version__])
        self._steps.setdefault(
            digest,
            Step(
                name=name,
                kind=kind,
                digest=digest,
                command=tuple(arguments),
                needs=frozenset(needs),
            ),
        )
        self._open.pop()
        return digest

    def _enter(self, name: str) -> None:
        if name in self._open:
            circle = " → ".join([*self._open[self._open.index(name) :], name])
            raise ExperimentError(f"{name}: goes in a circle: {circle}")
        self._open.append(name)

    def _fill(self, text: str, needs: set[str], owner: str) -> str:
        return _REFERENCE.sub(lambda found: self._value(found[1], needs, owner), text)

    def _value(self, name: str, needs: set[str], owner: str) -> str:
        if name in (_OUT, _SCORES):
            return f"{{{name}}}"
        if name in self._experiment.steps:
            digest = self.add(name, self._experiment.steps[name], "step")
            needs.add(digest)
            return f"{{{digest}}}"
        if name not in self._variables:
            raise ExperimentError(
                f"{owner}: {{{name}}} is neither a variable nor a step; there are "
                f"{', '.join([*self._variables, *self._experiment.steps])}"
            )
        value = self._variables[name]
        if value is None or isinstance(value, bool):
            raise ExperimentError(f"{owner}: {name} is {value} and stands inside of a word")
        if name in self._experiment.inputs:
            self._inputs[str(value)] = self._fingerprint(name, str(value))
            return str(value)
        if not isinstance(value, str):
            return str(value)
        self._enter(name)
        filled = self._fill(value, needs, owner)
        self._open.pop()
        return filled

    def _check(self, name: str, arguments: Sequence[str]) -> None:
        if self._commands is None:
            return
        found = next(
            (
                command
                for length in (2, 1)
                if (command := " ".join(arguments[:length])) in self._commands
            ),
            None,
        )
        if found is None:
            raise ExperimentError(
                f"{name}: should begin with a command of rankonce: "
                f"{', '.join(self._commands)}; begins with {' '.join(arguments[:2])!r}"
            )
        for word in arguments:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self._commands[found]:
                raise ExperimentError(f"{name}: rankonce {found} has no option {option}")


def _is_reference(word: str) -> bool:
    return _REFERENCE.fullmatch(word) is not None


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
