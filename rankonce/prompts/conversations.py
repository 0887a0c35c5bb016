"""Conversations: turns of a user and an assistant, and the usual files that hold them.

{"messages": [{"role": "user", "content": …}, …]}          OpenAI, ChatML
{"conversations": [{"from": "human", "value": …}, …]}      ShareGPT
{"instruction": …, "input": …, "output": …}                Alpaca
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rankonce.errors import DataError
from rankonce.records import Text, describe_faults

Role = Literal["system", "user", "assistant"]
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says.

    Attributes:
        is_learnt: whether an answer is an example to follow; only context otherwise.
    """

    role: Role
    content: str
    is_learnt: bool = True


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that alternate: perhaps one of the system, then user and assistant until an answer.

    Attributes:
        source: where it comes from, for messages: ``chat.jsonl: line 7``.

    Raises:
        DataError: names the turn that is out of order or empty.
    """

    turns: tuple[Turn, ...]
    source: str = ""

    def __post_init__(self) -> None:
        first = int(bool(self.turns) and self.turns[0].role == "system")
        for index, turn in enumerate(self.turns):
            expected = ("user", "assistant")[(index - first) % 2] if index >= first else "system"
            if turn.role != expected:
                raise DataError(
                    f"turns[{index}].role: should be {expected}, since user and assistant "
                    f"alternate behind a system turn at most, is {turn.role}"
                )
            if not turn.content.strip():
                raise DataError(f"turns[{index}].content: should be text, is empty")
        if len(self.turns) - first < 2 or self.turns[-1].role != "assistant":
            raise DataError("turns: should end with an answer of the assistant")
        if not any(turn.is_learnt for turn in self.turns if turn.role == "assistant"):
            raise DataError("turns: every answer has weight 0, so there is nothing to learn")

    @property
    def system(self) -> str | None:
        """What the system says, if anything."""
        return self.turns[0].content if self.turns[0].role == "system" else None

    @property
    def num_questions(self) -> int:
        """Pairs of question and answer."""
        return len(self.turns) // 2

    def first_questions(self, count: int) -> "Conversation":
        """Return the conversation up to the answer of a question.

        Raises:
            DataError: none of these answers is learnt.
        """
        end = 2 * count + (self.system is not None)
        return Conversation(turns=self.turns[:end], source=self.source)

    def as_json(self) -> dict[str, Any]:
        """Return it in the form of ``messages``."""
        return {
            "messages": [
                {"role": turn.role, "content": turn.content}
                | ({} if turn.is_learnt else {"weight": 0})
                for turn in self.turns
            ]
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Strict):
    type: Literal["text"]
    text: Text


class _Message(_Strict):
    role: Role
    content: Text | list[_Part]
    weight: Annotated[int, Field(ge=0, le=1)] = 1

    def turn(self) -> Turn:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return Turn(role=self.role, content=content, is_learnt=bool(self.weight))


class _ShareGptTurn(_Strict):
    speaker: str = Field(alias="from")
    value: Text

    @field_validator("speaker")
    @classmethod
    def _check_speaker(cls, speaker: str) -> str:
        if speaker not in _SHAREGPT_ROLES:
            raise ValueError(f"should be one of {', '.join(_SHAREGPT_ROLES)}, is {speaker!r}")
        return speaker

    def turn(self) -> Turn:
        return Turn(role=_SHAREGPT_ROLES[self.speaker], content=self.value)


# Beside the turns a line may hold what it likes: names, licences, sources.
class _Messages(BaseModel):
    model_config = ConfigDict(strict=True)
    messages: list[_Message]

    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]


class _ShareGpt(BaseModel):
    model_config = ConfigDict(strict=True)
    conversations: list[_ShareGptTurn]
    system: Text = ""

    def turns(self) -> list[Turn]:
        return [*_system(self.system), *(turn.turn() for turn in self.conversations)]


class _Alpaca(BaseModel):
    model_config = ConfigDict(strict=True)
    instruction: Text
    input: Text = ""
    output: Text
    system: Text = ""

    def turns(self) -> list[Turn]:
        # Below the instruction stands the input, as in Alpaca's own prompt.
        question = "\n".join(part for part in (self.instruction, self.input) if part.strip())
        return [
            *_system(self.system),
            Turn(role="user", content=question),
            Turn(role="assistant", content=self.output),
        ]


_FORMS: dict[str, type[_Messages | _ShareGpt | _Alpaca]] = {
    "messages": _Messages,
    "conversations": _ShareGpt,
    "instruction": _Alpaca,
}


def parse_conversation(line: str, *, source: str = "") -> Conversation:
    """Read one line of a chat file in any of the usual forms; fields that are null are absent.

    Raises:
        DataError: names the field that is wrong, missing or unknown.
    """
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}") from error
    form = next((_FORMS[name] for name in _FORMS if isinstance(data, dict) and name in data), None)
    if form is None:
        raise DataError(f"should be a JSON object with one of the fields {', '.join(_FORMS)}")
    try:
        turns = form.model_validate(_without_nulls(data)).turns()
    except ValidationError as error:
        raise DataError(describe_faults(error.errors())) from error
    return Conversation(turns=tuple(turns), source=source)


def read_conversations(paths: Iterable[Path], *, skip: int = 0) -> Iterator[Conversation]:
    """Read chat files a line at a time; blank lines are left out.

    Args:
        skip: conversations at the beginning that are passed over unread.

    Raises:
        DataError: names the file, the line and the field.
    """
    for path, number, line in islice(_lines(paths), skip, None):
        source = f"{path}: line {number}"
        try:
            yield parse_conversation(line, source=source)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error


def count_conversations(paths: Iterable[Path]) -> int:
    """Count the lines of chat files that are not blank."""
    return sum(1 for _ in _lines(paths))


def _lines(paths: Iterable[Path]) -> Iterator[tuple[Path, int, str]]:
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield path, number, line
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error


def _system(text: str) -> list[Turn]:
    return [Turn(role="system", content=text)] if text.strip() else []


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
