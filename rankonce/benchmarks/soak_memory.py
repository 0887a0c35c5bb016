"""Whether a server's memory grows: the first against the last part of its longest life."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Caches fill and allocators settle first.
_WARM_UP_SHARE = 0.2
_FEW_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Resident memory of the server at a moment.

    Attributes:
        seconds: since the soak began.
        life: number of the server process; a new one begins with new memory.
        mb: of the process and its children.
    """

    seconds: float
    life: int
    mb: float


def describe_memory(samples: Sequence[MemorySample]) -> dict[str, Any]:
    """Compare the first and the last quarter of the longest life, its warm-up left out.

    Returns:
        ``max_mb`` and ``samples`` of all lives; ``growth_mb`` and the slope ``mb_per_hour`` of the
        longest life, ``None`` where it is too short to tell.
    """
    record: dict[str, Any] = {
        "max_mb": max((sample.mb for sample in samples), default=None),
        "samples": [[round(s.seconds, 1), s.life, round(s.mb, 1)] for s in samples],
        "growth_mb": None,
        "mb_per_hour": None,
    }
    lives: dict[int, list[MemorySample]] = {}
    for sample in samples:
        lives.setdefault(sample.life, []).append(sample)
    longest = max(lives.values(), key=len, default=[])
    settled = longest[int(_WARM_UP_SHARE * len(longest)) :]
    if len(settled) < _FEW_SAMPLES:
        return record
    quarter = len(settled) // 4
    first, last = (
        statistics.median(sample.mb for sample in part)
        for part in (settled[:quarter], settled[-quarter:])
    )
    slope, _ = statistics.linear_regression(
        [sample.seconds / 3600 for sample in settled], [sample.mb for sample in settled]
    )
    return {
        **record,
        "first_mb": first,
        "last_mb": last,
        "growth_mb": last - first,
        "mb_per_hour": slope,
        "settled_minutes": (settled[-1].seconds - settled[0].seconds) / 60,
    }
