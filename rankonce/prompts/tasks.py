"""Tasks: named prompt definitions, each one YAML file.

A task's lines are texts with ``{field}`` in them. A line whose fields are all there is written,
one with a missing optional field is left out.
"""

import math
import re
import string
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankonce.errors import TaskError
from rankonce.prompts.spelling import FieldSpec
from rankonce.records import describe_faults

EVENT_FIELDS = ("action", "age")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lines(_Strict):
    """Fields and the lines that name them.

    Attributes:
        separator: stands between the lines.
    """

    fields: Mapping[str, FieldSpec] = Field(default_factory=dict)
    lines: tuple[str, ...] = ()
    separator: str = "\n"

    @model_validator(mode="after")
    def _check_lines(self) -> "Lines":
        for line in self.lines:
            _check_braces(line)
            for name in field_names(line):
                if name not in self.fields and name not in type(self).known_names():
                    raise ValueError(f"line {line!r} names {name!r}, which is not under fields")
        for name, spec in self.fields.items():
            if spec.impute_from is not None and spec.impute_from not in self.fields:
                raise ValueError(f"fields.{name}.impute_from names no field: {spec.impute_from!r}")
        return self

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        """Names that lines may use beside the declared fields."""
        return ()

    @property
    def always(self) -> set[str]:
        """Names that have a value in every request."""
        required = {name for name, spec in self.fields.items() if spec.required}
        return required.union(type(self).known_names())


class HistoryLines(Lines):
    """How the history is chosen and written.

    Attributes:
        policy: ``chronological`` keeps the newest that fit, ``recent`` the newest ``max_events``,
            ``balanced`` as many of each action as it can, ``similar`` those most like the
            candidates. All are written oldest first.
        max_tokens: bound of the written events; the oldest are dropped first.
        max_events: bound on the number of events.
        actions: the actions that events may have; any, if empty.
        heading: stands before the events.
        empty: stands there instead when there is no event.
    """

    policy: Literal["chronological", "recent", "balanced", "similar"] = "chronological"
    max_tokens: Annotated[int, Field(gt=0)] = 4096
    max_events: Annotated[int, Field(gt=0)] | None = None
    actions: tuple[str, ...] = ()
    heading: str = "History, oldest first:"
    empty: str = "No history yet."
    separator: str = " · "

    @model_validator(mode="after")
    def _check_policy(self) -> "HistoryLines":
        if self.policy != "chronological" and self.max_events is None:
            raise ValueError(f"policy {self.policy} needs max_events")
        return self

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        """Every event has these beside its item's fields."""
        return EVENT_FIELDS


class Label(_Strict):
    """One answer.

    Attributes:
        name: the answer word; one token after the answer slot (and a space in plain prompts).
        surface_forms: further spellings whose probability is added, each one token as well and
            taken to the letter: ``" yes"`` with its space, ``"Yes"`` without one.
        grade: its worth, for the ranking value ``expected_grade``.
    """

    name: Annotated[str, Field(min_length=1)]
    surface_forms: tuple[str, ...] = ()
    grade: float | None = None


class Ranking(_Strict):
    """How the ranking value comes from the label probabilities.

    Attributes:
        kind: ``log_odds`` of ``label`` against all others, or ``expected_grade``, sum of g * p_g.
        wanted: false where what ranks first is what the member does not want: hidden, dismissed.
            It changes no score; instructions made of records ask accordingly.
    """

    kind: Literal["log_odds", "expected_grade"]
    label: str | None = None
    wanted: bool = True


class LineStyle(_Strict):
    """Other lines for the same fields; what is ``None`` stays as the task has it."""

    lines: tuple[str, ...]
    separator: str | None = None


class HistoryStyle(LineStyle):
    """Other lines of the history, with what stands before the events or in their place."""

    heading: str | None = None
    empty: str | None = None


class Style(_Strict):
    """Another wording of a task, for training: the same facts and labels in other words.

    What is ``None`` stays as the task has it.
    """

    instruction: Annotated[str, Field(min_length=1)] | None = None
    profile: LineStyle | None = None
    history: HistoryStyle | None = None
    candidate: LineStyle | None = None
    question: Annotated[str, Field(min_length=1)] | None = None
    answer_slot: Annotated[str, Field(min_length=1)] | None = None


class Task(_Strict):
    """A named prompt definition.

    Attributes:
        styles: other wordings by name, which training may choose among. Scoring and evaluation
            use the task's own wording always.
        question_in: ``prefix`` asks once before all candidates; ``segment`` after each of them.
        answer_slot: the last words of a plain prompt; the label follows after a space.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    version: Annotated[int, Field(gt=0)] = 1
    description: str
    instruction: Annotated[str, Field(min_length=1)]
    profile: Lines = Lines()
    history: HistoryLines | None = None
    candidate: Lines
    question: Annotated[str, Field(min_length=1)]
    question_in: Literal["prefix", "segment"] = "prefix"
    answer_slot: Annotated[str, Field(min_length=1)] = "Answer:"
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    ranking: Ranking
    styles: Mapping[str, Style] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_labels(self) -> "Task":
        names = [label.name for label in self.labels]
        if len(set(names)) < len(names):
            raise ValueError("labels: every name should stand once")
        if not self.candidate.lines:
            raise ValueError("candidate.lines: should hold at least one line")
        for line in self.candidate.lines:
            # Prefix and segment are encoded apart, which a space between them would undo.
            if not line or line[0].isspace():
                raise ValueError(f"candidate.lines: {line!r} should begin with a word")
        if self.ranking.kind == "log_odds" and self.ranking.label not in names:
            raise ValueError(f"ranking.label: should be one of {', '.join(names)}")
        if self.ranking.kind == "expected_grade" and any(x.grade is None for x in self.labels):
            raise ValueError("labels: expected_grade needs a grade on every label")
        return self

    @model_validator(mode="after")
    def _check_styles(self) -> "Task":
        for name in self.styles:
            try:
                self._check_style(self.in_style(name))
            except ValidationError as error:
                faults = describe_faults(error.errors()).removeprefix("request: ")
                raise ValueError(f"styles.{name}.{faults}") from error
            except ValueError as error:
                raise ValueError(f"styles.{name}.{error}") from error
        return self

    def _check_style(self, styled: "Task") -> None:
        parts = {"profile": self.profile, "history": self.history, "candidate": self.candidate}
        for part, own in parts.items():
            if own is not None:
                other = getattr(styled, part).lines
                check_same_facts(own.lines, other, always=own.always, path=f"{part}.lines")
        named, asked = (_words(task.question) for task in (self, styled))
        for label in self.label_names:
            if label in named and label not in asked:
                raise ValueError(f"question: should name the label {label!r}, as the task's does")

    def in_style(self, name: str) -> "Task":
        """Return the task in one of its other wordings.

        Raises:
            TaskError: the task has no such style.
        """
        if name not in self.styles:
            known = ", ".join(self.styles) or "none"
            raise TaskError(f"style: should be one of {known}, is {name!r}")
        data = self.model_dump(exclude={"styles"})
        for key, change in self.styles[name].model_dump(exclude_none=True).items():
            if isinstance(change, dict) and data[key] is None:
                raise ValueError(f"{key}: the task has none")
            data[key] = {**data[key], **change} if isinstance(change, dict) else change
        return Task.model_validate(data)

    def wordings(self) -> "tuple[Task, ...]":
        """Return the task in its own wording and in every style."""
        return (self, *map(self.in_style, self.styles))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The answers in the task's order, the L of every score."""
        return tuple(label.name for label in self.labels)

    @property
    def grades(self) -> tuple[float, ...]:
        """The labels' grades, L; where log-odds rank, 1 for the ranked label and else 0."""
        if self.ranking.kind == "log_odds":
            return tuple(float(name == self.ranking.label) for name in self.label_names)
        return tuple(float(label.grade or 0.0) for label in self.labels)

    def ranking_value(self, log_probs: Mapping[str, float]) -> float:
        """Turn log P(label) into the number that candidates are ordered by."""
        if self.ranking.kind == "expected_grade":
            rows = zip(self.label_names, self.grades, strict=True)
            return sum(math.exp(log_probs[name]) * grade for name, grade in rows)
        others = [log_probs[name] for name in self.label_names if name != self.ranking.label]
        top = max(others)
        rest = top + math.log(sum(math.exp(other - top) for other in others))
        return log_probs[str(self.ranking.label)] - rest


def field_names(line: str) -> list[str]:
    """Return the names between braces in a line."""
    return [name for _, name, _, _ in string.Formatter().parse(line) if name is not None]


def check_same_facts(
    own: Sequence[str], other: Sequence[str], *, always: Collection[str], path: str
) -> None:
    """Check that two sets of lines write the same fields, whichever of these a request has.

    A line is written when all of its fields are there: lines write the same facts if the fields of
    each line are also written by the others' lines when only they are there.

    Args:
        always: fields that every request has.

    Raises:
        ValueError: names the line and what is left out or added.
    """
    for lines, others, fault in ((own, other, "leave out"), (other, own, "add")):
        for line in lines:
            facts = set(field_names(line))
            written = [set(names) for names in map(field_names, others)]
            found = set().union(*(w for w in written if w <= facts.union(always)))
            if missing := ", ".join(sorted(facts - found)):
                optional = " and ".join(sorted(facts.difference(always))) or "none"
                raise ValueError(
                    f"{path}: {fault} {missing} where the optional fields are {optional}"
                )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _check_braces(line: str) -> None:
    try:
        parts = list(string.Formatter().parse(line))
    except ValueError as error:
        raise ValueError(f"line {line!r}: {error}; a brace itself is written twice") from error
    for _, name, format_spec, conversion in parts:
        if format_spec or conversion:
            raise ValueError(f"line {line!r}: should name the field alone, as {{{name}}}")


def load_task(path: Path) -> Task:
    """Read a task file.

    Raises:
        TaskError: names the file and each field that is wrong.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Task.model_validate(data)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: is not YAML: {error}") from error
    except ValidationError as error:
        raise TaskError(f"{path}: {describe_faults(error.errors())}") from error


@cache
def library_tasks() -> dict[str, Task]:
    """Return the tasks that come with RankOnce, by name."""
    with resources.as_file(resources.files("rankonce.prompts") / "library") as folder:
        tasks = [load_task(path) for path in sorted(folder.glob("*.yaml"))]
    return {task.name: task for task in tasks}


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """Look a task up by name.

    Raises:
        TaskError: lists the names that exist.
    """
    if name not in tasks:
        raise TaskError(f"task: no task is called {name!r}; there are {', '.join(sorted(tasks))}")
    return tasks[name]
