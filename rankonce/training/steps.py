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
