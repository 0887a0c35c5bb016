"""What goes into a ranker and what comes out, as plain dataclasses.

``read_request`` turns decoded JSON into a ``ScoreRequest`` and names the field of every fault.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    with_config,
)

from rankonce.errors import RequestError


def _plain_value(value: object) -> object:
    """Let through what a field may hold."""
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return [_plain_value(part) for part in value]
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError("should be text, a number, true, false, null or a list of texts")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("should be a finite number")
    return _whole_text(value) if isinstance(value, str) else value


def _whole_text(value: str) -> str:
    # JSON can spell half of a surrogate pair; no tokenizer and no UTF-8 takes it.
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("should be text, holds half of a surrogate pair")
    return value


def _some_text(value: str) -> str:
    if not value.strip():
        raise ValueError("should be text, is empty")
    return value


def _unix_seconds(value: object) -> object:
    """Read a time: Unix seconds or ISO 8601 (UTC unless it names a zone)."""
    if isinstance(value, bool):
        raise ValueError("should be Unix seconds or an ISO 8601 time")
    if not isinstance(value, str):
        return value
    # Python reads strings of digits alone as dates of its own finding.
    if not re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        raise ValueError("should be Unix seconds or an ISO 8601 time that begins with YYYY-MM-DD")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError("should be Unix seconds or an ISO 8601 time") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


Text = Annotated[str, AfterValidator(_whole_text)]
Value = Annotated[Any, BeforeValidator(_plain_value)]
Time = Annotated[float, BeforeValidator(_unix_seconds)]
# Instances made in Python are checked as well when they come in a request.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that can be scored or that a member acted on.

    Attributes:
        fields: the values that the task's lines name, e.g. ``{"title": "Heat (1995)"}``.
        id: the caller's own name for it; returned unchanged.
    """

    fields: Mapping[str, Value]
    id: Text | None = None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Event:
    """One entry of the history.

    Attributes:
        time: when it happened, in Unix seconds (ISO 8601 is read as well).
        action: what the member did, in words: ``"liked"``, ``"applied"``.
    """

    item: Item
    action: Text
    time: Time


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class SolvedCandidate:
    """A candidate whose answer the prompt shows, as an example of the task.

    Attributes:
        item: its fields are those of a candidate.
        label: the name of one of the task's labels.
    """

    item: Item
    label: Text


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """One member or query, its history and its candidates, for one task.

    Attributes:
        task: the name of a task.
        candidates: what is scored; at least one.
        profile: the fields of the member or query that the task declares.
        history: events in any order; the task's policy orders and bounds them.
        examples: solved candidates that the prompt shows in this order, before the question.
        time: the moment of the request in Unix seconds; ages are counted back from it.
        id: the caller's own name for the request; returned unchanged.
        adapter: the name of an adapter that is loaded, or empty for the backbone alone; without
            one the adapter that learnt the task scores, if there is one.
        instruction: stands in the prompt instead of the task's instruction.
    """

    task: Text
    candidates: tuple[Item, ...]
    profile: Mapping[str, Value] = field(default_factory=dict)
    history: tuple[Event, ...] = ()
    examples: tuple[SolvedCandidate, ...] = ()
    time: Time | None = None
    id: Text | None = None
    adapter: Text | None = None
    instruction: Annotated[Text, AfterValidator(_some_text)] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """A request whose answers are known.

    Attributes:
        labels: the label of every candidate, in the request's order: its name, or a probability
            for each name (a soft label), or ``None`` where it is not known.
        teacher: log P(label) by name as a teacher gives it for every candidate, ``None`` where it
            was not asked; ``None`` without a teacher.
        source: the file and the line that it was read from, for messages.
    """

    request: ScoreRequest
    labels: tuple[str | Mapping[str, float] | None, ...]
    teacher: tuple[Mapping[str, float] | None, ...] | None = None
    source: str | None = field(default=None, compare=False)

    def place(self, number: int) -> str:
        """Say where it stands: in its file, or as which example where it comes from none."""
        return self.source or f"example {number}"


@dataclass(frozen=True, kw_only=True)
class CandidateScore:
    """The scores of one candidate.

    Attributes:
        log_probs: log P(label), normalised over the task's labels.
        value: the ranking value that the task declares; higher ranks first.
        rank: 1 for the best; equal values keep the request's order.
        label_mass: probability of all labels together in the whole vocabulary, where it was
            asked for. A small mass says that the model wanted to answer something else.
        raw_value, raw_log_probs: the model's own, where ``value`` and ``log_probs`` are calibrated;
            the rank always comes from the model's own.
    """

    id: str | None
    log_probs: Mapping[str, float]
    value: float
    rank: int
    label_mass: float | None = None
    raw_value: float | None = None
    raw_log_probs: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class HistoryReport:
    """What the history policy kept and what it dropped.

    Attributes:
        policy: the name of the policy.
        num_events: events in the request.
        num_kept: events in the prompt.
        dropped: indices into the request's history, ascending, with the reason of each.
    """

    policy: str
    num_events: int
    num_kept: int
    dropped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenUsage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: prefix once and every segment: what the packed prompt holds.
        computed_tokens: those that went through the model.
        cached_tokens: prefix tokens that came from the prefix cache.
        separate_tokens: what one prompt per candidate would have cost.
    """

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    separate_tokens: int


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """The answer to a ``ScoreRequest``.

    Attributes:
        candidates: in the request's own order.
        distinct_score_ratio: distinct values over distinct candidates; 1.0 is healthy. Candidates
            of one text count once, with the value of the first.
        warnings: what the caller should know, in words.
        adapter: the adapter that scored; ``None`` is the backbone alone.
        calibration: the method, where the scores are calibrated.
    """

    id: str | None
    task: str
    candidates: tuple[CandidateScore, ...]
    history: HistoryReport
    usage: TokenUsage
    distinct_score_ratio: float
    warnings: tuple[str, ...] = ()
    adapter: str | None = None
    calibration: str | None = None

    def ranked(self) -> list[CandidateScore]:
        """Return the candidates, best first."""
        return sorted(self.candidates, key=lambda candidate: candidate.rank)


_REQUEST = TypeAdapter(ScoreRequest)


def read_request(data: Any, *, needs_candidates: bool = True) -> ScoreRequest:
    """Check decoded JSON, or a request made in Python, and make a request of it.

    Args:
        needs_candidates: refuse a request that has none.

    Raises:
        RequestError: names each field that is wrong, missing or unknown.
    """
    try:
        request = _REQUEST.validate_python(data)
    except ValidationError as error:
        raise RequestError(describe_faults(error.errors())) from error
    if needs_candidates and not request.candidates:
        raise RequestError("candidates: should hold at least one candidate")
    return request


def describe_faults(faults: Sequence[Any]) -> str:
    """Put pydantic's list of faults into one line, ``field[index].name: what is wrong``."""
    lines = []
    for fault in faults:
        path = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]
        )
        unknown = fault["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        message = "unknown field" if unknown else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{path.removeprefix('.') or 'request'}: {message}")
    return "; ".join(lines)
