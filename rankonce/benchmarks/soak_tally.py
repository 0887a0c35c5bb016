"""What became of the questions of a soak."""

from collections import Counter
from dataclasses import dataclass, field

MAX_FAULTS_KEPT = 20


@dataclass(kw_only=True)
class Tally:
    """What became of the questions.

    Attributes:
        outcomes: number by kind of question and what came of it.
        faults: what must not happen, in words; the first few.
        num_faults: all of them.
        worst_difference: greatest difference of a log-probability in a right answer.
        latencies_ms: of right answers.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    num_wrong: int = 0
    worst_difference: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)

    def blame(self, fault: str) -> None:
        """Note what must not happen."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS_KEPT:
            self.faults.append(fault)
