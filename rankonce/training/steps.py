"""Units become optimiser steps, and steps become passes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from rankonce.training.objectives import Unit

U = TypeVar("U", bound=Unit)


def shuffle_units(units: Sequence[U], *, seed: int) -> list[U]:
    """Order units at random."""
    return [units[index] for index in np.random.default_rng(seed).permutation(len(units)).tolist()]


def shuffle_stream(units: Iterable[U], *, buffer_size: int, seed: int) -> Iterator[U]:
    """Order a stream at random as far as a buffer of ``buffer_size`` units reaches."""
    random = np.random.default_rng(seed)
    stream = iter(units)
    buffer = list(islice(stream, buffer_size))
    for unit in stream:
        place = int(random.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = unit
    yield from shuffle_units(buffer, seed=seed)


def cut_into_steps(units: Iterable[U], *, targets_per_step: int) -> Iterator[list[U]]:
    """Gather units, in their order, into steps of about ``targets_per_step`` targets each."""
    step: list[U] = []
    targets = 0
    for unit in units:
        if targets >= targets_per_step:
            yield step
            step, targets = [], 0
        step.append(unit)
        targets += unit.num_targets
    if step:
        yield step


def split_by_tokens(units: Sequence[U], *, max_tokens_per_pass: int) -> list[list[U]]:
    """Cut a step into passes under a token budget; a unit is never cut."""
    passes: list[list[U]] = [[]]
    tokens = 0
    for unit in units:
        if passes[-1] and tokens + unit.num_tokens > max_tokens_per_pass:
            passes.append([])
            tokens = 0
        passes[-1].append(unit)
        tokens += unit.num_tokens
    return passes


def share_passes(
    units: Sequence[U], *, max_tokens_per_pass: int, rank: int, num_processes: int
) -> list[tuple[list[U], float]]:
    """Give one of several processes its passes of a step, as many as every other.

    The passes are cut to about the same size. A process that there are too few units for repeats
    the first pass at a weight of 0, since gradients are exchanged by all.

    Returns:
        Passes, each with the weight of its loss.
    """
    passes = split_by_tokens(units, max_tokens_per_pass=max_tokens_per_pass)
    if num_processes == 1:
        return [(part, 1.0) for part in passes]
    num_passes = -(-len(passes) // num_processes) * num_processes
    # The smallest budget under which the step takes no more passes than that.
    low, high = 0, max_tokens_per_pass
    while high - low > 1:
        middle = (low + high) // 2
        cut = split_by_tokens(units, max_tokens_per_pass=middle)
        low, high = (low, middle) if len(cut) <= num_passes else (middle, high)
    passes = split_by_tokens(units, max_tokens_per_pass=high)
    weighted = [(part, 1.0) for part in passes]
    weighted += [(passes[0], 0.0)] * (num_passes - len(passes))
    return weighted[rank::num_processes]
