"""The steps of an experiment's runs.

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
from typing import Any, Literal

from rankonce import __version__
from rankonce.distillation.experiments.declaration import OUT, SCORES, Experiment, Value
from rankonce.errors import ExperimentError

_REFERENCE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command that is run once, whichever runs need it.

    Attributes:
        name: in the file.
        digest: of the command with its needs' digests and its input files' contents.
        command: arguments, where ``{out}`` and ``{scores}`` are still to be filled in and a need
            stands as ``{digest}``.
        needs: digests of steps.
        alone: runs when nothing else does.
    """

    name: str
    kind: Literal["step", "measure"]
    digest: str
    command: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    alone: bool = False


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
        # By a mark that no command holds: an input's path and the digest of its contents.
        self._inputs: dict[str, tuple[str, str]] = {}

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
        if kind == "step" and not any(f"{{{OUT}}}" in word for word in arguments):
            raise ExperimentError(f"steps.{name}: should write to {{{OUT}}}: {command!r}")
        # What an input holds counts, not where it lies.
        contents = [self._put(word, 1) for word in arguments]
        arguments = [self._put(word, 0) for word in arguments]
        digest = _digest([kind, contents, __version__])
        self._steps.setdefault(
            digest,
            Step(
                name=name,
                kind=kind,
                digest=digest,
                command=tuple(arguments),
                needs=frozenset(needs),
                alone=name in self._experiment.alone,
            ),
        )
        self._open.pop()
        return digest

    def _put(self, word: str, place: int) -> str:
        for mark, both in self._inputs.items():
            word = word.replace(mark, both[place])
        return word

    def _enter(self, name: str) -> None:
        if name in self._open:
            circle = " → ".join([*self._open[self._open.index(name) :], name])
            raise ExperimentError(f"{name}: goes in a circle: {circle}")
        self._open.append(name)

    def _fill(self, text: str, needs: set[str], owner: str) -> str:
        return _REFERENCE.sub(lambda found: self._value(found[1], needs, owner), text)

    def _value(self, name: str, needs: set[str], owner: str) -> str:
        if name in (OUT, SCORES):
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
            # Put in when the command is whole: a path may be a part of another.
            mark = f"\0{name}\0"
            self._inputs[mark] = (str(value), self._fingerprint(name, str(value)))
            return mark
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
