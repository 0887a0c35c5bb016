import pytest

from rankonce.benchmarks.serve_capacity import find_capacity
from rankonce.benchmarks.serve_load import LoadStep


def _measure(rate: float, capacity: float) -> LoadStep:
    """A server whose p99 passes the bound of 100 ms above its capacity."""
    is_late = rate > capacity
    return LoadStep(
        rate=rate,
        num_requests=10,
        num_answered=10,
        num_refused=0,
        seconds=1.0,
        p50_ms=10.0,
        p90_ms=20.0,
        p99_ms=None if rate > 2 * capacity else 150.0 if is_late else 50.0,
        max_lag_ms=0.1,
        broken_off=rate > 2 * capacity,
    )


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.3, 90.0])
def test_the_capacity_is_found_to_the_precision(capacity: float) -> None:
    found = find_capacity(
        lambda rate: _measure(rate, capacity), bound_ms=100.0, alone_rate=4.0, precision=0.1
    )
    assert found.rate <= capacity <= 1.1 * found.rate
    assert found.rate == max(step.rate for step in found.steps if step.meets(100.0))


def test_a_server_that_meets_the_bound_at_no_rate_has_no_capacity() -> None:
    found = find_capacity(
        lambda rate: _measure(rate, 0.0), bound_ms=100.0, alone_rate=4.0, precision=0.1
    )
    assert found.rate == 0
    assert min(step.rate for step in found.steps) == 4.0 / 64
