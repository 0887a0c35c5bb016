"""Observations are counted, handed on, and copied."""

from rankonce.serving.observations import Histogram, Observations, PassObserved, Refusal, Stage


class Listener:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_stage(self, stage: Stage, seconds: float) -> None:
        self.heard.append((stage, seconds))

    def on_pass(self, seen: PassObserved) -> None:
        self.heard.append(seen)

    def on_refusal(self, reason: Refusal) -> None:
        self.heard.append(reason)


PASS = PassObserved(
    num_requests=2, num_candidates=7, computed_tokens=75, cached_tokens=12, max_tokens=100,
    seconds=0.02,
)  # fmt: skip


def test_a_histogram_counts_a_value_at_its_bound_and_one_above_all() -> None:
    histogram = Histogram(bounds=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 1, 1]
    assert (histogram.count, histogram.total) == (4, 12.0)


def test_subscribers_hear_everything_after_they_subscribed() -> None:
    observations, listener = Observations(), Listener()
    observations.on_refusal(Refusal.DEADLINE)
    observations.subscribe(listener)
    observations.on_stage(Stage.WAIT, 0.25)
    observations.on_pass(PASS)
    observations.on_refusal(Refusal.QUEUE_FULL)
    assert listener.heard == [(Stage.WAIT, 0.25), PASS, Refusal.QUEUE_FULL]


def test_a_snapshot_holds_what_was_counted_and_stays_as_it_is() -> None:
    observations = Observations()
    for _ in range(3):
        observations.on_pass(PASS)
    observations.on_stage(Stage.FORWARD, 0.02)
    observations.on_refusal(Refusal.CLIENT_GONE)
    snapshot = observations.snapshot()
    observations.on_pass(PASS)
    observations.on_refusal(Refusal.CLIENT_GONE)
    assert (snapshot.num_passes, snapshot.num_candidates) == (3, 21)
    assert (snapshot.computed_tokens, snapshot.cached_tokens) == (225, 36)
    assert snapshot.pass_efficiency.counts[7] == 3
    assert snapshot.seconds[Stage.FORWARD].count == 1
    assert snapshot.refusals == {
        Refusal.QUEUE_FULL: 0,
        Refusal.DEADLINE: 0,
        Refusal.CLIENT_GONE: 1,
    }
