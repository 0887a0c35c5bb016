"""What the engine sees of its own work: counts, histograms, and callbacks for whoever exports them.

The engine reports to an ``Observations``, which counts and hands every observation on to its
subscribers. Nothing here knows how metrics are exported::

    engine.observations.subscribe(my_observer)   # called with every observation
    engine.observations.snapshot()               # counts so far, as plain data

Subscribers are called on the event loop: they should be quick and raise nothing.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Stage(StrEnum):
    """Where the seconds of a question go."""

    TOKENISE = "tokenise"
    WAIT = "wait"
    FORWARD = "forward"
    ANSWER = "answer"


class Refusal(StrEnum):
    """Why a question was not computed.

    Attributes:
        QUEUE_FULL: too many questions or tokens wait; 429.
        DEADLINE: its time was over, or too short for what it asks; 503.
        CLIENT_GONE: nobody waits for the answer any more.
    """

    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    CLIENT_GONE = "client_gone"


@dataclass(frozen=True, kw_only=True)
class PassObserved:
    """One forward pass.

    Attributes:
        num_requests, num_candidates: that had a part in it.
        computed_tokens: that went through the model.
        cached_tokens: prefix tokens that did not have to.
        max_tokens: what a pass may hold.
        seconds: of the pass, from packing to scores on the host.
        adapter: whose weights it ran with.
    """

    num_requests: int
    num_candidates: int
    computed_tokens: int
    cached_tokens: int
    max_tokens: int
    seconds: float
    adapter: str | None = None

    @property
    def efficiency(self) -> float:
        """Useful tokens over what the pass may hold."""
        return self.computed_tokens / self.max_tokens


@dataclass(frozen=True, kw_only=True)
class CacheObserved:
    """What a cache did so far and holds now.

    Attributes:
        hits, misses: look-ups; a hit found at least something.
        hit_tokens, asked_tokens: tokens found, and tokens looked for; where a cache counts tokens.
        evictions: entries that went to make room.
        num_bytes, max_bytes: held now, and the bound; 0 where a cache is bounded by entries.
        num_entries: held now.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    asked_tokens: int = 0
    evictions: int = 0
    num_bytes: int = 0
    max_bytes: int = 0
    num_entries: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups; 0 before the first."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class QueueObserved:
    """What is under way now.

    Attributes:
        num_open: questions admitted and not answered: being tokenised, waiting or running.
        num_waiting: requests that wait for a pass or for the rest of theirs.
        waiting_tokens: theirs, not computed yet.
    """

    num_open: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0


class Observer(Protocol):
    """Hears of everything that the engine does, as it happens."""

    def on_stage(self, stage: Stage, seconds: float) -> None:
        """Hear how long one question spent in a stage."""

    def on_pass(self, seen: PassObserved) -> None:
        """Hear of a pass that ran."""

    def on_refusal(self, reason: Refusal) -> None:
        """Hear of a question that is not computed."""


@dataclass(kw_only=True)
class Histogram:
    """Counts of values by upper bounds, each inclusive; the last count is of what lies above.

    Attributes:
        bounds: ascending.
        counts: one more than bounds; not cumulative.
        total: sum of the values.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


SECONDS: tuple[float, ...] = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(30.0, 60.0),
)
TOKENS: tuple[float, ...] = tuple(float(1 << exponent) for exponent in range(6, 18))
SHARES: tuple[float, ...] = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything counted so far, detached from the engine.

    Attributes:
        refusals: by reason.
        seconds: of questions, by stage.
        pass_tokens, pass_efficiency, pass_seconds: of passes.
        num_passes, num_candidates, computed_tokens, cached_tokens: sums over passes.
    """

    refusals: dict[Refusal, int]
    seconds: dict[Stage, Histogram]
    pass_tokens: Histogram
    pass_efficiency: Histogram
    pass_seconds: Histogram
    num_passes: int
    num_candidates: int
    computed_tokens: int
    cached_tokens: int


class Observations:
    """Counts what the engine reports and hands it on.

    Args:
        observers: the first subscribers.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)
        self._refusals: Counter[Refusal] = Counter()
        self._seconds = {stage: Histogram(bounds=SECONDS) for stage in Stage}
        self._pass_tokens = Histogram(bounds=TOKENS)
        self._pass_efficiency = Histogram(bounds=SHARES)
        self._pass_seconds = Histogram(bounds=SECONDS)
        self._sums: Counter[str] = Counter()

    def subscribe(self, observer: Observer) -> None:
        """Call an observer with everything that is reported from now on."""
        self._observers.append(observer)

    def on_stage(self, stage: Stage, seconds: float) -> None:
        """Count the seconds that one question spent in a stage."""
        self._seconds[stage].add(seconds)
        for observer in self._observers:
            observer.on_stage(stage, seconds)

    def on_pass(self, seen: PassObserved) -> None:
        """Count a pass."""
        self._pass_tokens.add(seen.computed_tokens)
        self._pass_efficiency.add(seen.efficiency)
        self._pass_seconds.add(seen.seconds)
        self._sums["num_passes"] += 1
        for name in ("num_candidates", "computed_tokens", "cached_tokens"):
            self._sums[name] += getattr(seen, name)
        for observer in self._observers:
            observer.on_pass(seen)

    def on_refusal(self, reason: Refusal) -> None:
        """Count a question that is not computed."""
        self._refusals[reason] += 1
        for observer in self._observers:
            observer.on_refusal(reason)

    def snapshot(self) -> Snapshot:
        """Copy the counts."""
        return Snapshot(
            refusals={reason: self._refusals[reason] for reason in Refusal},
            seconds={stage: _copy(histogram) for stage, histogram in self._seconds.items()},
            pass_tokens=_copy(self._pass_tokens),
            pass_efficiency=_copy(self._pass_efficiency),
            pass_seconds=_copy(self._pass_seconds),
            num_passes=self._sums["num_passes"],
            num_candidates=self._sums["num_candidates"],
            computed_tokens=self._sums["computed_tokens"],
            cached_tokens=self._sums["cached_tokens"],
        )


def _copy(histogram: Histogram) -> Histogram:
    return Histogram(bounds=histogram.bounds, counts=list(histogram.counts), total=histogram.total)
