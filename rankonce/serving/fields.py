"""Values that several questions share, each with its own check.

A check says what would be right, so that the answer can name field and fault in one line.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, StrictInt

# Scores of one question are prompts times labels.
_MAX_LABELS = 1000
NOT_ONE_TOKEN = "should be 1: the next token's probabilities are read, nothing is generated"


def example(*more: dict[str, Any], **fields: Any) -> ConfigDict:
    """Configure a question: fields that it does not know are refused, and these are its examples.

    Args:
        more: examples beside that of ``fields``.
    """
    return ConfigDict(
        extra="forbid", allow_inf_nan=False, json_schema_extra={"examples": [fields, *more]}
    )


def only(*allowed: Any, why: str) -> BeforeValidator:
    """Refuse every value but these; null always passes.

    Args:
        why: ends the message, after "should be ... or left out: ".
    """

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in allowed):
            return value
        right = "".join(f"{json.dumps(one)} or " for one in allowed)
        raise ValueError(f"should be {right}left out: {why}")

    return BeforeValidator(check)


def check_one_token(value: Any) -> Any:
    """Refuse every number of tokens but 1; null passes."""
    if value is None or (type(value) is int and value == 1):
        return value
    raise ValueError(NOT_ONE_TOKEN)


def read_prompts(value: Any) -> list[str] | list[tuple[int, ...]]:
    """Read one prompt or a list of them, each text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return list(value)
        if _is_ids(value):
            return [tuple(value)]
        if all(isinstance(part, list) and _is_ids(part) for part in value):
            return [tuple(part) for part in value]
    raise ValueError(
        "should be text, a list of texts, a list of token ids or a list of lists of token ids"
    )


def _read_query(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and _is_ids(value):
        return tuple(value)
    raise ValueError("should be text or a list of token ids")


def _read_items(value: Any) -> list[str] | list[tuple[int, ...]]:
    if isinstance(value, list) and _is_ids(value):
        raise ValueError("should be a list of texts or a list of lists of token ids")
    return read_prompts(value)


def _read_content(value: Any) -> str:
    """Join the text parts of a message by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("should be text or a list of text parts")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError('should hold text parts only, {"type": "text", "text": "..."}')
        texts.append(text)
    return "\n".join(texts)


def _is_ids(value: Sequence[Any]) -> bool:
    # A bool is an int to Python.
    return all(type(part) is int for part in value)


Prompts = Annotated[
    list[str] | list[tuple[int, ...]],
    PlainValidator(
        read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Query = Annotated[
    str | tuple[int, ...], PlainValidator(_read_query, json_schema_input_type=str | list[int])
]
Items = Annotated[
    list[str] | list[tuple[int, ...]],
    PlainValidator(_read_items, json_schema_input_type=str | list[str] | list[list[int]]),
]
Content = Annotated[
    str, PlainValidator(_read_content, json_schema_input_type=str | list[dict[str, str]])
]
LabelWords = Annotated[list[str], Field(min_length=1, max_length=_MAX_LABELS)]
LabelIds = Annotated[list[StrictInt], Field(min_length=1, max_length=_MAX_LABELS)]
TopN: TypeAlias = Annotated[int, Field(ge=1)] | None
Ignored = Annotated[Any, Field(description="Taken and ignored: it cannot change this answer.")]

Priority = Annotated[
    int, Field(ge=-1000, le=1000, description="Lower is served first; others have 0.")
]
Timeout = Annotated[
    int | None,
    Field(
        ge=1,
        description="Milliseconds after which nobody wants the answer: 503 then, or as soon as it "
        "is known.",
    ),
]

OneToken = Annotated[
    int | None,
    BeforeValidator(check_one_token),
    Field(description="1: the next token's probabilities are read, nothing is generated."),
]
OneChoice = Annotated[int | None, only(1, why="a prompt has one most probable next token")]
NoStream = Annotated[bool | None, only(False, why="the answer is one token")]
NoBias = Annotated[
    dict[str, Any] | None, only({}, why="scores are those of the model, ask for labels instead")
]
NoStop = Annotated[list[Any] | None, only([], why="generation always stops after one token")]
Refused = Annotated[None, only(why="the server cannot do it")]
RefusedList = Annotated[list[Any] | None, only([], why="the server cannot do it")]
