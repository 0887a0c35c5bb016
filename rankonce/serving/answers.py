"""Shapes of the server's answers; those of reranking are in ``rerank_shapes``."""

import math
import time
import uuid
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from rankonce.records import HistoryReport, ScoreResult


def answer_id(kind: str) -> str:
    """Make an id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def _now() -> int:
    return int(time.time())


class CachedTokens(BaseModel):
    """How many prompt tokens did not go through the model: shared in the pass, or cached."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens as OpenAI counts them: every prompt whole."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens


class RankUsage(BaseModel):
    """Tokens of a rank question.

    Attributes:
        prompt_tokens: the prefix once and every segment.
        computed_tokens: those that went through the model.
        cached_tokens: prefix tokens from the prefix cache.
        separate_tokens: what one prompt a candidate would have cost.
    """

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    computed_tokens: int
    cached_tokens: int
    separate_tokens: int


class RankedCandidate(BaseModel):
    """The scores of one candidate; ``index`` is its place in the question.

    Attributes:
        raw_value: the model's own, which ranks; ``value`` where nothing is calibrated.
        raw_probabilities: the model's own, null where nothing is calibrated.
    """

    index: int
    id: str | None
    rank: int
    value: float
    raw_value: float
    probabilities: dict[str, float]
    raw_probabilities: dict[str, float] | None
    log_probs: dict[str, float]
    label_mass: float | None


class DroppedEvent(BaseModel):
    """An event of the history that the prompt does not hold."""

    event: int
    reason: str


class HistoryPart(BaseModel):
    """What the task's history policy kept and dropped."""

    policy: str
    num_events: int
    num_kept: int
    dropped: list[DroppedEvent]


class RankAnswer(BaseModel):
    """Every candidate in the question's order, or the ``top_n`` best, best first."""

    object: Literal["rank"] = "rank"
    id: str | None
    model: str
    adapter: str | None
    task: str
    calibration: str | None
    results: list[RankedCandidate]
    history: HistoryPart
    usage: RankUsage
    distinct_score_ratio: float
    warnings: list[str]


class PrefixAnswer(BaseModel):
    """A prepared prefix; ``id`` stands for it in ``/v1/rank`` until ``expires_at``."""

    object: Literal["prefix"] = "prefix"
    id: str
    model: str
    adapter: str | None
    task: str
    expires_at: int
    history: HistoryPart
    usage: RankUsage


def history_part(history: HistoryReport) -> HistoryPart:
    """Write what the history policy did."""
    return HistoryPart(
        policy=history.policy,
        num_events=history.num_events,
        num_kept=history.num_kept,
        dropped=[
            DroppedEvent(event=event, reason=reason) for event, reason in history.dropped.items()
        ],
    )


def rank_answer(result: ScoreResult, *, model: str, top_n: int | None) -> RankAnswer:
    """Write a result as an answer."""
    results = [
        RankedCandidate(
            index=index,
            id=candidate.id,
            rank=candidate.rank,
            value=candidate.value,
            raw_value=candidate.value if candidate.raw_value is None else candidate.raw_value,
            probabilities=_exponents(candidate.log_probs),
            raw_probabilities=(
                None if candidate.raw_log_probs is None else _exponents(candidate.raw_log_probs)
            ),
            log_probs=dict(candidate.log_probs),
            label_mass=candidate.label_mass,
        )
        for index, candidate in enumerate(result.candidates)
    ]
    if top_n is not None:
        results = sorted(results, key=lambda candidate: candidate.rank)[:top_n]
    usage = result.usage
    return RankAnswer(
        id=result.id,
        model=model,
        adapter=result.adapter,
        task=result.task,
        calibration=result.calibration,
        results=results,
        history=history_part(result.history),
        usage=RankUsage(
            prompt_tokens=usage.prompt_tokens,
            total_tokens=usage.prompt_tokens,
            computed_tokens=usage.computed_tokens,
            cached_tokens=usage.cached_tokens,
            separate_tokens=usage.separate_tokens,
        ),
        distinct_score_ratio=result.distinct_score_ratio,
        warnings=list(result.warnings),
    )


def _exponents(log_probs: Mapping[str, float]) -> dict[str, float]:
    return {name: math.exp(value) for name, value in log_probs.items()}


class ScoreAnswer(BaseModel):
    """SGLang's score answer: for each item the probabilities of the labels, in their order."""

    object: Literal["scoring"] = "scoring"
    scores: list[list[float]]
    model: str
    usage: Usage


class GenerativeScore(BaseModel):
    """The probability of the first label after one item; ``index`` is its place."""

    index: int
    object: Literal["score"] = "score"
    score: float


class GenerativeScoringAnswer(BaseModel):
    """vLLM's answer to a generative scoring question."""

    id: str = Field(default_factory=lambda: answer_id("generative-scoring"))
    object: Literal["list"] = "list"
    created: int = Field(default_factory=_now)
    model: str
    data: list[GenerativeScore]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the one token, over the whole vocabulary."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The most probable token after one prompt."""

    index: int
    text: str
    finish_reason: Literal["length"] = "length"
    logprobs: CompletionLogprobs | None


class CompletionAnswer(BaseModel):
    """OpenAI's completions answer."""

    object: Literal["text_completion"] = "text_completion"
    id: str = Field(default_factory=lambda: answer_id("cmpl"))
    created: int = Field(default_factory=_now)
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """One possible next token; ``bytes`` is null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The most probable token and others."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the one token, over the whole vocabulary."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The most probable token as a message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The one choice."""

    index: int = 0
    message: AssistantMessage
    finish_reason: Literal["length"] = "length"
    logprobs: ChatLogprobs | None


class ChatAnswer(BaseModel):
    """OpenAI's chat answer."""

    object: Literal["chat.completion"] = "chat.completion"
    id: str = Field(default_factory=lambda: answer_id("chatcmpl"))
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model served, or an adapter over it, whose ``parent`` it is.

    ``fingerprint`` identifies the weights where they were loaded here from a folder.
    """

    object: Literal["model"] = "model"
    id: str
    created: int
    owned_by: str = "rankonce"
    max_model_len: int
    parent: str | None = None
    fingerprint: str | None = None


class ModelList(BaseModel):
    """OpenAI's list form."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The server takes questions."""

    status: Literal["ok"] = "ok"
    model: str


class ErrorPart(BaseModel):
    """What went wrong; ``param`` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error form."""

    error: ErrorPart
