"""What the suite is asked for and what it finds, as plain dataclasses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rankonce.errors import DataError
from rankonce.evaluation.metrics import Estimate

# The requests as they are, the first arm of every task.
BASE = "as it is"
RANKER, FLOOR, TREES, CEILING = "ranker", "popularity", "trees", "truth"
# With less room between floor and ceiling, a part of it says nothing.
_LEAST_ROOM = 0.02
Group = Literal["T1", "T2", "unknown"]


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What is measured.

    Attributes:
        examples: numbers of solved candidates in the prompt, an arm each.
        history: numbers of newest events in the prompt, an arm each; ``None`` is all of them.
        titles: also measure with the titles shuffled.
        num_resamples: bootstrap samples of members.
        seed: of everything that is drawn.
    """

    examples: tuple[int, ...] = (2, 8)
    history: tuple[int | None, ...] = (0, 5, 20, 50, None)
    titles: bool = True
    num_resamples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 2:
            raise DataError(f"num_resamples: should be at least 2, not {self.num_resamples}")
        for name, low, numbers in (("examples", 1, self.examples), ("history", 0, self.history)):
            wrong = any(number is not None and number < low for number in numbers)
            if wrong or len(set(numbers)) < len(numbers):
                given = ["all" if number is None else number for number in numbers]
                raise DataError(f"{name}: should be different numbers from {low}, are {given}")


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One arm of a task.

    Attributes:
        family, size: examples, history or titles and its number, which is ``None`` for all
            events; both are ``None`` for the requests as they are.
        left_out: why there is no number; empty where there is one.
        metrics: of the ranker, by name.
        difference: of the main metric from the requests as they are, on the same rows.
        events_kept: mean number of events in the prompt.
        prompt_tokens: mean number of tokens of a packed prompt.
    """

    name: str
    family: str | None = None
    size: int | None = None
    left_out: str = ""
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    difference: Estimate | None = None
    events_kept: float | None = None
    prompt_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class BucketReport:
    """The main metric on a part of the rows, by ranker."""

    kind: str
    name: str
    num_rows: int
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What was measured of a task.

    Attributes:
        group: T1, T2, or unknown where nothing says what the model was trained on.
        failure: why the task could not be measured; empty where it was.
        main: the metric of buckets, differences and plots.
        rankers: metrics of the ranker, the floor and, where they are known, trees and the ceiling.
        distinct_score_ratio: mean over requests.
        label_shares: how often each label stands in the rows.
        arms: the first one is the requests as they are.
        reliability: mean probability, share and rows of each bin.
        asked: first and last time of the scored requests, Unix seconds.
    """

    task: str
    group: Group
    source: str = ""
    failure: str = ""
    main: str = ""
    num_requests: int = 0
    num_members: int = 0
    num_rows: int = 0
    label_shares: Mapping[str, float] = field(default_factory=dict)
    rankers: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    distinct_score_ratio: float | None = None
    arms: Sequence[ArmReport] = ()
    buckets: Sequence[BucketReport] = ()
    reliability: Sequence[tuple[float, float, int]] = ()
    asked: tuple[float, float] | None = None
    computed_tokens: int = 0
    separate_tokens: int = 0
    seconds: float = 0.0

    def arm(self, name: str) -> ArmReport | None:
        """Look an arm up that has numbers."""
        return next((arm for arm in self.arms if arm.name == name and not arm.left_out), None)

    @property
    def reach(self) -> float | None:
        """How far the main metric comes from the floor (0) to the ceiling (1), if that is known."""
        if CEILING not in self.rankers:
            return None
        floor, ceiling, value = (
            self.rankers[name][self.main].value for name in (FLOOR, CEILING, RANKER)
        )
        if math.isnan(floor + ceiling + value) or ceiling - floor < _LEAST_ROOM:
            return None
        return (value - floor) / (ceiling - floor)


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """Every task of a run.

    Attributes:
        trained_on: tasks that the model was trained on; ``None`` where nothing says.
        left_out: tasks without data, with the reason.
    """

    model: str
    trained_on: tuple[str, ...] | None
    config: SuiteConfig
    tasks: Sequence[TaskReport]
    left_out: Mapping[str, str]
    seconds: float

    @property
    def failures(self) -> list[TaskReport]:
        """Tasks that could not be measured."""
        return [task for task in self.tasks if task.failure]
