"""What ``rankonce score`` did, summed up in a few lines."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankonce.records import ScoreResult


@dataclass(kw_only=True)
class Summary:
    """What a run did.

    Attributes:
        num_before: results that a resumed run found done.
        lowest_ratio: the lowest distinct-score ratio of a request, and its line.
        first_reject: line and reason of the first reject.
    """

    rejects: Path | None
    num_before: int = 0
    num_scored: int = 0
    num_rejected: int = 0
    num_candidates: int = 0
    num_warned: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    separate_tokens: int = 0
    ratio_sum: float = 0.0
    lowest_ratio: tuple[float, int] = (1.0, 0)
    first_reject: str = ""
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begin to count the seconds."""
        self.started = time.perf_counter()

    def count(self, line: int, result: "ScoreResult") -> None:
        """Take a result in."""
        self.num_scored += 1
        self.num_candidates += len(result.candidates)
        self.num_warned += bool(result.warnings)
        self.computed_tokens += result.usage.computed_tokens
        self.cached_tokens += result.usage.cached_tokens
        self.separate_tokens += result.usage.separate_tokens
        self.ratio_sum += result.distinct_score_ratio
        if result.distinct_score_ratio < self.lowest_ratio[0]:
            self.lowest_ratio = (result.distinct_score_ratio, line)

    def add(self, other: "Summary") -> None:
        """Take in what another worker did."""
        self.num_scored += other.num_scored
        self.num_rejected += other.num_rejected
        self.num_candidates += other.num_candidates
        self.num_warned += other.num_warned
        self.computed_tokens += other.computed_tokens
        self.cached_tokens += other.cached_tokens
        self.separate_tokens += other.separate_tokens
        self.ratio_sum += other.ratio_sum
        self.lowest_ratio = min(self.lowest_ratio, other.lowest_ratio)
        self.first_reject = self.first_reject or other.first_reject

    def describe(self) -> str:
        """Say it in a few lines."""
        seconds = time.perf_counter() - self.started
        lines = [
            f"scored {self.num_scored:,} requests with {self.num_candidates:,} candidates in "
            f"{seconds:.1f} s, {self.num_candidates / seconds:,.0f} candidates/s"
        ]
        if self.num_before:
            lines.append(f"resumed after {self.num_before:,} requests that were done")
        if self.num_rejected:
            lines.append(f"rejected {self.num_rejected:,} requests, see {self.rejects}")
        if self.num_scored:
            saved = 1 - self.computed_tokens / self.separate_tokens
            ratio, line = self.lowest_ratio
            lowest = f", {ratio:.3f} at the lowest, in line {line}" if line else ""
            lines += [
                f"computed {self.computed_tokens:,} tokens, {self.cached_tokens:,} more came from "
                f"the prefix cache; one prompt a candidate has {self.separate_tokens:,}: "
                f"{saved:.0%} saved",
                f"distinct-score ratio {self.ratio_sum / self.num_scored:.3f}{lowest}",
            ]
        if self.num_warned:
            lines.append(f"warnings stand in the results of {self.num_warned:,} requests")
        return "\n".join(lines)
