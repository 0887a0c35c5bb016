"""A request and its task become text, and the text becomes token ids.

prefix    instruction · profile · history · examples · question      read once
segment   candidate · answer slot                                    once a candidate
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from rankonce.errors import PromptTooLongError, RequestError
from rankonce.layout import TokenizedRequest
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.history import choose_events
from rankonce.prompts.labels import resolve_labels
from rankonce.prompts.spelling import spell, spell_age
from rankonce.prompts.tasks import Lines, Task, field_names
from rankonce.records import Event, HistoryReport, ScoreRequest, Value

_EXAMPLES_HEADING = "Examples with their answers:"
# What may follow an instruction: its last tokens are those that none of these changes.
_ANY_BODIES = ("The member", "0", "\n", " a", "(")


@dataclass(frozen=True, kw_only=True)
class RenderedRequest:
    """The text of a request.

    Attributes:
        prefix: what all candidates share, with the model's frame around it.
        segments: one text a candidate; ``prefix + segment`` is a whole prompt.
        history: what the history policy kept and dropped.
        tokens: the same as token ids.
    """

    prefix: str
    segments: tuple[str, ...]
    history: HistoryReport
    tokens: TokenizedRequest


class Renderer:
    """Renders the requests of any task for one tokenizer.

    Args:
        encoder: the model's tokenizer with its frame.
        max_prompt_tokens: the longest prefix and segment that the model takes.
    """

    def __init__(self, encoder: TextEncoder, *, max_prompt_tokens: int) -> None:
        self.encoder = encoder
        self.max_prompt_tokens = max_prompt_tokens
        self._label_ids: dict[object, tuple[tuple[int, ...], ...]] = {}

    def label_ids(self, task: Task) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of a task's labels, found once."""
        key = (task.labels, task.answer_slot)
        if key not in self._label_ids:
            self._label_ids[key] = resolve_labels(task, self.encoder)
        return self._label_ids[key]

    def instruction_ids(self, task: Task) -> tuple[int, ...]:
        """Return the tokens that every prefix of a task begins with."""
        prefixes = [self.encoder.encode_prefix(task.instruction, body) for body in _ANY_BODIES]
        same = (len(set(ids)) == 1 for ids in zip(*prefixes, strict=False))
        return prefixes[0][: sum(takewhile(bool, same))]

    def render(
        self, task: Task, request: ScoreRequest, *, cache_salt: str | None = None
    ) -> RenderedRequest:
        """Render a request; one without candidates has a prefix and no segments.

        Args:
            cache_salt: token ids that are kept for one salt are not used for another.

        The history is shortened by the task's policy, to the task's budget or to what the model's
        context leaves, and the report says so. Nothing else is ever shortened, examples neither.

        Raises:
            RequestError: names the field that is missing, unknown or has a value of another type.
            PromptTooLongError: the prompt does not fit even with an empty history.
            LabelError: a label is not one token.
        """
        label_ids = self.label_ids(task)
        segments = [
            _join(_segment_lines(task, candidate.fields, f"candidates[{index}].fields"))
            + ("" if self.encoder.chat else f"\n{task.answer_slot}")
            for index, candidate in enumerate(request.candidates)
        ]
        segment_ids = self.encoder.encode_segments(segments, cache_salt=cache_salt)
        longest = max(map(len, segment_ids), default=1)
        events, examples = _write_events(task, request), _write_examples(task, request)
        instruction = request.instruction or task.instruction
        body = _body(task, request, [], examples)
        prefix_ids = self.encoder.encode_prefix(instruction, body)
        room = self.max_prompt_tokens - longest - len(prefix_ids)
        if room < 0:
            lengths = [len(ids) for ids in segment_ids]
            fault = f"candidates[{lengths.index(longest)}]" if lengths else "profile"
            without = ""
            if examples and self._fits(task, replace(request, examples=()), longest):
                fault, without = "examples", f"; without the {len(examples)} examples it would fit"
            elif self._fits(task, replace(request, instruction=None), longest):
                fault, without = "instruction", "; with that of the task it would fit"
            raise PromptTooLongError(
                f"{fault}: the prompt has {len(prefix_ids) + longest} tokens without any history, "
                f"the model takes {self.max_prompt_tokens}{without}"
            )
        report = HistoryReport(policy="none", num_events=0, num_kept=0)
        if task.history is not None:
            event_tokens = self.encoder.count_tokens(events, cache_salt=cache_salt)
            budget = min(task.history.max_tokens, room)
            excess = 1
            while excess > 0:
                kept, report = choose_events(
                    request.history,
                    request.candidates,
                    event_tokens,
                    task.history,
                    max_tokens=budget,
                )
                body = _body(task, request, [events[index] for index in kept], examples)
                prefix_ids = self.encoder.encode_prefix(instruction, body)
                # The heading may be longer than the line that stands for an empty history.
                excess = len(prefix_ids) + longest - self.max_prompt_tokens
                budget = max(0, budget - excess)
        return RenderedRequest(
            prefix=self._frame(instruction, body),
            segments=tuple(segment + self.encoder.tail for segment in segments),
            history=report,
            tokens=TokenizedRequest(
                prefix_ids=prefix_ids,
                segment_ids=tuple(segment_ids),
                label_ids=label_ids,
                cache_salt=cache_salt,
            ),
        )

    def _fits(self, task: Task, request: ScoreRequest, longest: int) -> bool:
        """Whether a request fits without any history, with its longest segment."""
        body = _body(task, request, [], _write_examples(task, request))
        ids = self.encoder.encode_prefix(request.instruction or task.instruction, body)
        return len(ids) + longest <= self.max_prompt_tokens

    def _frame(self, instruction: str, body: str) -> str:
        between = self.encoder.middle or "\n"
        return f"{self.encoder.head}{instruction}{between}{body}"


def _body(task: Task, request: ScoreRequest, events: Sequence[str], examples: Sequence[str]) -> str:
    """Everything of the prefix after the instruction; ends with a line break."""
    lines = _write_lines(task.profile, request.profile, "profile")
    if task.history is not None:
        lines += [task.history.heading, *events] if events else [task.history.empty]
    if examples:
        lines += [_EXAMPLES_HEADING, *examples]
    if task.question_in == "prefix":
        lines.append(task.question)
    return "".join(f"{line}\n" for line in lines)


def _segment_lines(task: Task, fields: Mapping[str, Value], path: str) -> list[str]:
    written = _write_lines(task.candidate, fields, path)
    if not written:
        raise RequestError(f"{path}: leave no line of the task to write")
    lines = [task.candidate.separator.join(written)]
    return [*lines, task.question] if task.question_in == "segment" else lines


def _join(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _write_examples(task: Task, request: ScoreRequest) -> list[str]:
    """Write solved candidates as the segments are, with the label in the answer slot.

    In a chat prompt as well: the answer slot there is the turn of the model, which cannot stand
    inside that of the member.
    """
    texts = []
    for index, example in enumerate(request.examples):
        path = f"examples[{index}]"
        if example.label not in task.label_names:
            raise RequestError(
                f"{path}.label: should be one of {', '.join(task.label_names)}, is "
                f"{example.label!r}"
            )
        lines = _segment_lines(task, example.item.fields, f"{path}.item.fields")
        texts.append(_join([*lines, f"{task.answer_slot} {example.label}"]))
    return texts


def _write_events(task: Task, request: ScoreRequest) -> list[str]:
    spec = task.history
    if spec is None:
        if request.history:
            raise RequestError(f"history: task {task.name!r} has no history, leave it out")
        return []
    named = {name for line in spec.lines for name in field_names(line)}
    texts = []
    for index, event in enumerate(request.history):
        path = f"history[{index}]"
        if spec.actions and event.action not in spec.actions:
            raise RequestError(
                f"{path}.action: should be one of {', '.join(spec.actions)}, is {event.action!r}"
            )
        extra = {"action": " ".join(event.action.split())}
        if not extra["action"]:
            raise RequestError(f"{path}.action: should be text, is empty")
        if request.time is not None and event.time > request.time:
            raise RequestError(f"{path}.time: lies after the time of the request")
        if "age" in named:
            extra["age"] = _age(task, request, event)
        lines = _write_lines(spec, event.item.fields, f"{path}.item.fields", extra)
        texts.append(spec.separator.join(lines))
    return texts


def _age(task: Task, request: ScoreRequest, event: Event) -> str:
    if request.time is None:
        raise RequestError(
            f"time: task {task.name!r} says how long ago events were, so it needs a time"
        )
    return spell_age(request.time - event.time)


def _write_lines(
    part: Lines, fields: Mapping[str, Value], path: str, extra: Mapping[str, str] | None = None
) -> list[str]:
    """Write the lines whose fields are all there."""
    for name in fields:
        if name not in part.fields:
            known = ", ".join(part.fields) or "none"
            raise RequestError(f"{path}.{name}: unknown field; the task knows {known}")
    words = dict(extra or {})
    for name, spec in part.fields.items():
        value = fields.get(name)
        blank = value is None or (isinstance(value, str) and not value.strip())
        if blank and spec.impute_from is not None:
            value = fields.get(spec.impute_from)
        if value is not None:
            words[name] = spell(value, spec, path=f"{path}.{name}")
        elif spec.required:
            raise RequestError(f"{path}.{name}: is required and missing")
    return [
        line.format_map(words)
        for line in part.lines
        if all(name in words for name in field_names(line))
    ]
