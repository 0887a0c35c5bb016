"""What a ranker asks of another engine, and what it is told."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Prompts that begin alike.

    Attributes:
        prefix_ids: what all of them begin with; may be empty.
        segment_ids: the rest of each, at least one token.
        label_ids: tokens whose log-probabilities are asked for after every prompt, all different.
        num_top: also asks for this many most probable tokens.
        cache_salt: groups of different salts never share what an engine keeps of a prefix.
    """

    prefix_ids: tuple[int, ...]
    segment_ids: tuple[tuple[int, ...], ...]
    label_ids: tuple[int, ...]
    num_top: int = 0
    cache_salt: str | None = None

    def prompts(self, first: int, last: int) -> list[list[int]]:
        """Return some of the prompts whole."""
        return [[*self.prefix_ids, *segment] for segment in self.segment_ids[first:last]]


@dataclass(kw_only=True)
class GroupScores:
    """What an engine says of a group's prompts, or of the first of them.

    Attributes:
        label_logprobs: log P(token) in the whole vocabulary, by prompt and label token.
        top: the most probable tokens by prompt, best first, where asked for.
        prompt_tokens: as the engine counts them.
        cached_tokens: of those, what it had computed before, as far as it tells.
    """

    label_logprobs: list[list[float]] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def extend(self, other: "GroupScores") -> None:
        """Add what was said of the prompts that follow."""
        self.label_logprobs += other.label_logprobs
        self.top += other.top
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens


class Backend(ABC):
    """An engine that computes log-probabilities.

    Attributes:
        engine: its name, as ``--engine`` has it.
        max_prompt_tokens: the longest prompt that it reads.
        num_passes: that it takes at one time.
    """

    engine: str
    max_prompt_tokens: int
    num_passes = 1

    @abstractmethod
    def score(self, groups: Sequence[PromptGroup]) -> list[GroupScores]:
        """Score the prompts of groups, in their order.

        Raises:
            EngineError: the engine does not answer, or not what was asked for.
            RequestError: it has no answer to this kind of question.
        """

    @abstractmethod
    def check(self) -> None:
        """Make sure that the engine answers.

        Raises:
            EngineError: it does not.
        """

    def tokenize(self, text: str) -> list[int] | None:
        """Encode a text as the engine does, without special tokens; ``None`` if it cannot tell."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine."""
