"""Instructions over a domain: questions about records with answers that are true by their facts.

An instruction is declared in a YAML file: its kind, and phrasings of the question and of the answer
in each case. The kind is a function here that finds what fits the phrasings' slots in a record; it
finds nothing where the facts are missing, so that no false statement is written.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankonce.errors import TaskError
from rankonce.prompts import findings
from rankonce.prompts.conversations import Conversation, Turn
from rankonce.prompts.facts import Record, tell_record
from rankonce.prompts.findings import Actions, Finding
from rankonce.prompts.tasks import Task
from rankonce.records import TrainingExample, describe_faults


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an instruction of a kind can ask and answer.

    Attributes:
        find: finds a question and its true answer in a record.
        question: slots of the question.
        answers: for each case slots of the answer, beside those of the question.
        needs_actions: the file says which actions speak for an item and which against it.
    """

    find: Callable[[Record, Actions, np.random.Generator], Finding | None]
    question: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]
    needs_actions: bool = False


_REASON = ("field", "values", "event", "action")
KINDS: Mapping[str, Kind] = {
    "choose-and-why": Kind(
        find=findings.choose_and_why,
        question=("choices",),
        answers={"answer": ("choice", *_REASON)},
        needs_actions=True,
    ),
    "yes-or-no-and-why": Kind(
        find=findings.yes_or_no_and_why,
        question=("item",),
        answers={"chosen": _REASON, "passed": _REASON},
        needs_actions=True,
    ),
    "summarise-taste": Kind(
        find=findings.summarise_taste,
        question=(),
        answers={"answer": ("action", "total", "field", "summary")},
        needs_actions=True,
    ),
    "in-common": Kind(
        find=findings.in_common, question=("items",), answers={"answer": ("common",)}
    ),
    "odd-one-out": Kind(
        find=findings.odd_one_out,
        question=("items",),
        answers={"answer": ("item", "field", "value")},
    ),
    "fill-in": Kind(
        find=findings.fill_in, question=("given", "field"), answers={"answer": ("value",)}
    ),
    "order-by": Kind(
        find=findings.order_by, question=("items", "order"), answers={"answer": ("ordered",)}
    ),
    "compare-two": Kind(
        find=findings.compare_two,
        question=("first", "second", "measure"),
        answers={"answer": ("winner", "value", "loser", "other_value")},
    ),
    "true-or-false": Kind(
        find=findings.true_or_false,
        question=("item", "field", "value"),
        answers={"right": (), "wrong": ("actual",)},
    ),
    "which-came-first": Kind(
        find=findings.which_came_first,
        question=("first", "second"),
        answers={"answer": ("earlier", "later")},
    ),
    "recall-action": Kind(
        find=findings.recall_action, question=("item",), answers={"answer": ("action",)}
    ),
    "count-actions": Kind(
        find=findings.count_actions,
        question=("action",),
        answers={"some": ("count", "total"), "none": ("total",)},
    ),
}

Phrasings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]


class Instruction(BaseModel):
    """A declared instruction.

    Attributes:
        kind: what is asked; one of ``KINDS``.
        questions: phrasings with ``{slots}`` of the kind.
        answers: phrasings for each case that the kind tells apart.
        actions_for, actions_against: actions that speak for what an item has, or against it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    description: str
    questions: Phrasings
    answers: Mapping[str, Phrasings]
    actions_for: tuple[str, ...] = ()
    actions_against: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_slots(self) -> "Instruction":
        if self.kind not in KINDS:
            raise ValueError(f"kind: should be one of {', '.join(KINDS)}, is {self.kind!r}")
        kind = KINDS[self.kind]
        if set(self.answers) != set(kind.answers):
            raise ValueError(
                f"answers: should have the cases {', '.join(kind.answers)}, "
                f"have {', '.join(self.answers) or 'none'}"
            )
        for question in self.questions:
            _check_phrasing(question, needed=kind.question, known=kind.question)
        for case, slots in kind.answers.items():
            for answer in self.answers[case]:
                _check_phrasing(answer, needed=slots[:1], known=(*kind.question, *slots))
        if kind.needs_actions and not self.actions_for:
            raise ValueError("actions_for: should hold at least one action")
        if not kind.needs_actions and (self.actions_for or self.actions_against):
            raise ValueError(f"actions_for, actions_against: do not belong to kind {self.kind}")
        return self

    @property
    def actions(self) -> Actions:
        """What actions say."""
        return Actions(liking=self.actions_for, disliking=self.actions_against)


def _check_phrasing(text: str, *, needed: Sequence[str], known: Sequence[str]) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; a brace itself is written twice") from error
    if any(format_spec or conversion for _, _, format_spec, conversion in parts):
        raise ValueError(f"{text!r} should name slots alone, as {{slot}}")
    names = [name for _, name, _, _ in parts if name is not None]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{text!r} names {unknown[0]!r}; the kind has the slots {', '.join(known) or 'none'}"
        )
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{text!r} should name {{{missing[0]}}}")


def load_instruction(path: Path) -> Instruction:
    """Read the file of an instruction.

    Raises:
        TaskError: names the file and each field that is wrong.
    """
    try:
        return Instruction.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: is not YAML: {error}") from error
    except ValidationError as error:
        raise TaskError(f"{path}: {describe_faults(error.errors())}") from error


@cache
def library_instructions() -> tuple[Instruction, ...]:
    """Return the instructions that come with RankOnce, in the order of their files."""
    with resources.as_file(resources.files("rankonce.prompts") / "instructions") as folder:
        return tuple(load_instruction(path) for path in sorted(folder.glob("*.yaml")))


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """How conversations are made of records.

    Attributes:
        max_questions: a conversation has from one to this many questions, each of another kind.
        max_events: the newest events are told.
        max_candidates: so many candidates are told.
    """

    max_questions: int = 4
    max_events: int = 12
    max_candidates: int = 5


def ask_about(
    example: TrainingExample,
    task: Task,
    random: np.random.Generator,
    *,
    instructions: Sequence[Instruction],
    config: QuestionConfig,
    source: str = "",
) -> Conversation | None:
    """Ask about a labelled request, which is told once, before the first question.

    Args:
        random: draws what is told, asked and in which words.

    Returns:
        A conversation, ``None`` where no instruction finds its facts.

    Raises:
        RequestError: names the field that the task does not know, or whose value has another type.
    """
    record = tell_record(
        example,
        task,
        random,
        max_events=config.max_events,
        max_candidates=config.max_candidates,
    )
    wanted = int(random.integers(1, config.max_questions + 1))
    turns: list[Turn] = []
    for place in random.permutation(len(instructions)).tolist():
        instruction = instructions[place]
        finding = KINDS[instruction.kind].find(record, instruction.actions, random)
        if finding is None:
            continue
        question = _phrase(instruction.questions, finding.slots, random)
        if not turns and record.text:
            question = f"{record.text}\n{question}"
        answer = _phrase(instruction.answers[finding.case], finding.slots, random)
        turns += [Turn(role="user", content=question), Turn(role="assistant", content=answer)]
        if len(turns) == 2 * wanted:
            break
    return Conversation(turns=tuple(turns), source=source) if turns else None


def _phrase(phrasings: Sequence[str], slots: Mapping[str, str], random: np.random.Generator) -> str:
    return phrasings[int(random.integers(len(phrasings)))].format_map(slots)
