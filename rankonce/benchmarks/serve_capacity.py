"""The highest rate at which p99 stays within a bound: doubling, then bisection."""

from collections.abc import Callable
from dataclasses import dataclass

from rankonce.benchmarks.serve_load import LoadStep

# A server that fails at this share of what it does one request at a time meets the bound nowhere.
_LOWEST_SHARE = 1 / 64
_MAX_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a search found.

    Attributes:
        rate: highest that met the bound, requests a second; 0 if none did.
        steps: every rate that was tried, in order.
    """

    rate: float
    steps: tuple[LoadStep, ...]


def find_capacity(
    measure: Callable[[float], LoadStep], *, bound_ms: float, alone_rate: float, precision: float
) -> Capacity:
    """Search the highest rate whose p99 is within the bound.

    Args:
        measure: runs one step at a rate.
        alone_rate: requests a second of a client that waits for each answer; the search begins
            at half of it.
        precision: the search ends when the lowest rate that failed is at most this much, as a
            share, above the highest that passed.
    """
    steps: list[LoadStep] = []
    passed, failed = 0.0, float("inf")
    rate = alone_rate / 2
    while len(steps) < _MAX_STEPS:
        steps.append(measure(rate))
        if steps[-1].meets(bound_ms):
            passed = max(passed, rate)
        else:
            failed = min(failed, rate)
        if failed == float("inf"):
            rate = 2 * passed
        elif passed == 0:
            rate = failed / 2
            if rate < alone_rate * _LOWEST_SHARE:
                break
        elif failed <= passed * (1 + precision):
            break
        else:
            rate = (passed + failed) / 2
    return Capacity(rate=passed, steps=tuple(steps))
