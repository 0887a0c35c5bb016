"""Shapes of the questions that the server takes; those of its answers are in ``answers``.

Reranking has its own module for both, ``rerank_shapes``.

Unknown fields are refused everywhere. Fields that ask for what cannot be given are declared with
the values that ask for nothing, so that the refusal names them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
    with_config,
)

from rankonce.records import Item, ScoreRequest, Text
from rankonce.serving.fields import (
    NOT_ONE_TOKEN,
    Content,
    Ignored,
    Items,
    LabelIds,
    LabelWords,
    NoBias,
    NoStop,
    NoStream,
    OneChoice,
    OneToken,
    Priority,
    Prompts,
    Query,
    Refused,
    RefusedList,
    Timeout,
    TopN,
    example,
    only,
)


def _some_candidates(candidates: tuple[Item, ...]) -> tuple[Item, ...]:
    if not candidates:
        raise ValueError("should hold at least one candidate")
    return candidates


def _no_candidates(candidates: tuple[Item, ...]) -> tuple[Item, ...]:
    if candidates:
        raise ValueError("should be left out: they come with the prefix's id, to /v1/rank")
    return candidates


@with_config(
    example(
        task="movie-like",
        time=1_700_000_000,
        profile={"num_ratings": 42, "like_share": 0.6},
        history=[
            {
                "item": {"fields": {"title": "Heat (1995)", "genres": ["Crime", "Thriller"]}},
                "action": "liked",
                "time": 1_690_000_000,
            }
        ],
        candidates=[
            {"id": "a", "fields": {"title": "Ronin (1998)", "genres": ["Crime", "Thriller"]}},
            {"id": "b", "fields": {"title": "Big (1988)", "genres": ["Comedy"]}},
        ],
    )
)
@dataclass(frozen=True, kw_only=True)
class RankBody(ScoreRequest):
    """A ``ScoreRequest`` as JSON.

    Attributes:
        model: the name of the model served, or of one of its adapters.
        top_n: answer with the best only, best first.
        prefix: the id of a prepared prefix, in place of everything that comes before candidates.
        priority: lower is served first.
        timeout_ms: after which nobody wants the answer.
    """

    task: Text = ""
    candidates: Annotated[tuple[Item, ...], AfterValidator(_some_candidates)]
    model: str | None = None
    top_n: TopN = None
    prefix: str | None = None
    priority: Priority = 0
    timeout_ms: Timeout = None


@with_config(
    example(
        task="movie-like",
        time=1_700_000_000,
        profile={"num_ratings": 42, "like_share": 0.6},
    )
)
@dataclass(frozen=True, kw_only=True)
class PrefixBody(ScoreRequest):
    """A ``RankBody`` before its candidates are known.

    Attributes:
        model, priority, timeout_ms: as in ``RankBody``.
        ttl_s: seconds for which the handle holds; the server's setting by default and at most.
    """

    candidates: Annotated[tuple[Item, ...], AfterValidator(_no_candidates)] = ()
    model: str | None = None
    ttl_s: Annotated[int, Field(ge=1)] | None = None
    priority: Priority = 0
    timeout_ms: Timeout = None


class WithLabels(BaseModel):
    """Labels as words or as token ids, never both."""

    priority: Priority = 0
    timeout_ms: Timeout = None
    labels: LabelWords | None = None
    label_token_ids: LabelIds | None = None

    @model_validator(mode="after")
    def _check_labels(self) -> "WithLabels":
        if self.labels is not None and self.label_token_ids is not None:
            raise ValueError("labels and label_token_ids: give one of the two")
        return self

    @property
    def has_labels(self) -> bool:
        """Whether labels are asked for."""
        return self.labels is not None or self.label_token_ids is not None


class ScoreBody(WithLabels):
    """SGLang's score question, with labels as words beside it."""

    model_config = example(
        query="Film: Heat (1995)\nWill the member like it?",
        items=["\nAnswer:", "\nReply:"],
        labels=[" Yes", " No"],
        apply_softmax=True,
    )
    query: Query
    items: Items
    apply_softmax: bool = False
    item_first: bool = False
    model: str | None = None
    return_pooled_hidden_states: Annotated[
        bool | None, only(False, why="hidden states are not given out")
    ] = None

    @model_validator(mode="after")
    def _check_kinds(self) -> "ScoreBody":
        if not self.has_labels:
            raise ValueError("label_token_ids: is required and missing (or labels, as words)")
        if isinstance(self.query, str) != isinstance(self.items[0], str):
            raise ValueError("items: should be texts like query, or token ids like query")
        return self


class GenerativeScoringBody(WithLabels):
    """vLLM's generative scoring question, with labels as words beside it.

    The form is that of ``vllm/entrypoints/generate/generative_scoring`` (vLLM pull request 34539):
    query and items are encoded apart, and the score is the probability of the first label.
    """

    model_config = example(
        query="Film: Heat (1995)\n",
        items=["Will the member like it? Answer:", "Is it new? Answer:"],
        labels=[" Yes", " No"],
    )
    query: Query
    items: Items
    apply_softmax: bool = True
    item_first: bool = False
    add_special_tokens: bool = True
    model: str | None = None
    request_id: str | None = None

    @model_validator(mode="after")
    def _check_given(self) -> "GenerativeScoringBody":
        if not self.has_labels:
            raise ValueError("label_token_ids: is required and missing (or labels, as words)")
        return self


class CompletionBody(WithLabels):
    """OpenAI's completions question for one token."""

    model_config = example(
        prompt=["Film: Heat (1995)\nAnswer:", "Film: Big (1988)\nAnswer:"],
        max_tokens=1,
        logprobs=2,
        labels=[" Yes", " No"],
    )
    prompt: Prompts
    max_tokens: Annotated[OneToken, Field(validate_default=True)] = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    model: str | None = None
    n: OneChoice = None
    best_of: OneChoice = None
    stream: NoStream = None
    stream_options: Refused = None
    echo: Annotated[bool | None, only(False, why="prompts are not sent back")] = None
    suffix: Annotated[str | None, only("", why="nothing is generated before it")] = None
    logit_bias: NoBias = None
    stop: NoStop = None
    temperature: Ignored = None
    top_p: Ignored = None
    seed: Ignored = None
    presence_penalty: Ignored = None
    frequency_penalty: Ignored = None
    user: Ignored = None

    @field_validator("max_tokens")
    @classmethod
    def _is_given(cls, value: int | None) -> int:
        # OpenAI's default is 16.
        if value is None:
            raise ValueError(NOT_ONE_TOKEN)
        return value


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Refused = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: RefusedList = None
    annotations: RefusedList = None


class ChatBody(WithLabels):
    """OpenAI's chat question for one token."""

    model_config = example(
        messages=[{"role": "user", "content": "Is Heat (1995) a film? Answer Yes or No."}],
        max_completion_tokens=1,
        logprobs=True,
        top_logprobs=2,
        labels=["Yes", "No"],
    )
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: OneToken = None
    max_tokens: Annotated[OneToken, Field(validate_default=True)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    model: str | None = None
    n: OneChoice = None
    stream: NoStream = None
    stream_options: Refused = None
    logit_bias: NoBias = None
    stop: NoStop = None
    tools: RefusedList = None
    tool_choice: Annotated[str | None, only("none", "auto", why="there are no tools")] = None
    parallel_tool_calls: Ignored = None
    functions: RefusedList = None
    function_call: Annotated[str | None, only("none", "auto", why="there are no tools")] = None
    response_format: Annotated[
        dict[str, str] | None, only({"type": "text"}, why="one token has no format")
    ] = None
    modalities: Annotated[list[str] | None, only(["text"], why="only text can be read")] = None
    audio: Refused = None
    prediction: Refused = None
    moderation: Refused = None
    web_search_options: Refused = None
    reasoning_effort: Annotated[str | None, only("none", why="the next token answers")] = None
    store: Annotated[bool | None, only(False, why="nothing is kept")] = None
    temperature: Ignored = None
    top_p: Ignored = None
    seed: Ignored = None
    presence_penalty: Ignored = None
    frequency_penalty: Ignored = None
    metadata: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    verbosity: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("max_tokens")
    @classmethod
    def _is_given(cls, value: int | None, info: ValidationInfo) -> int | None:
        # A fault in the other field is reported there.
        if value is None and info.data.get("max_completion_tokens", 1) is None:
            raise ValueError(NOT_ONE_TOKEN)
        return value

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self


class LoadAdapterBody(BaseModel):
    """vLLM's question for one more adapter.

    Attributes:
        lora_name: what ``model`` calls it from then on.
        lora_path: a folder on the server, in PEFT's form.
        load_inplace: replace one of the same name.
        model: the model that it is over; the first one by default. Ours.
    """

    model_config = example(lora_name="films", lora_path="runs/films")
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    model: str | None = None
    is_3d_lora_weight: Annotated[
        bool | None, only(False, why="adapters are in the form that PEFT writes")
    ] = None


class UnloadAdapterBody(BaseModel):
    """vLLM's question to forget an adapter."""

    model_config = example(lora_name="films")
    lora_name: str
    lora_int_id: Ignored = None
