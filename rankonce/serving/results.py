"""Scores of pairs that were asked before: the same prefix, candidate, labels and adapter."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import torch

from rankonce.layout import TokenizedRequest
from rankonce.model.scoring import RawScores
from rankonce.serving.observations import CacheObserved

# What stands before a candidate, as far as its score depends on it: adapter, salt, prefix, labels,
# and whether the whole vocabulary was read.
_Before = tuple[str | None, str | None, bytes, tuple[tuple[int, ...], ...], bool]
# Log-probabilities of the labels, and of all of them together where the vocabulary was read.
_Row = tuple[tuple[float, ...], float | None]


@dataclass(frozen=True, kw_only=True)
class PartlyKnown:
    """A request of which some candidates are known.

    Attributes:
        request: the whole request.
        missing: the same with those candidates only that are not known; ``None`` if there is none.
        rows: by place, what is known.
    """

    request: TokenizedRequest
    missing: TokenizedRequest | None
    rows: dict[int, _Row]


@dataclass(kw_only=True)
class ResultCache:
    """Least recently used pairs go first when the bound is reached.

    Attributes:
        max_pairs: bound on the pairs held; 0 keeps nothing.
    """

    max_pairs: int
    _rows: OrderedDict[tuple[_Before, tuple[int, ...]], _Row] = field(default_factory=OrderedDict)
    _hits: int = 0
    _misses: int = 0
    _evictions: int = 0

    def look_up(self, request: TokenizedRequest, *, whole: bool) -> PartlyKnown:
        """Find what is known of a request."""
        before, rows = _before(request, whole), dict[int, _Row]()
        for place, segment in enumerate(request.segment_ids):
            row = self._rows.get((before, segment))
            if row is not None:
                self._rows.move_to_end((before, segment))
                rows[place] = row
        self._hits += len(rows)
        self._misses += len(request.segment_ids) - len(rows)
        missing = tuple(
            segment for place, segment in enumerate(request.segment_ids) if place not in rows
        )
        return PartlyKnown(
            request=request,
            missing=replace(request, segment_ids=missing) if missing else None,
            rows=rows,
        )

    def complete(self, known: PartlyKnown, raw: RawScores | None, *, whole: bool) -> RawScores:
        """Put what is known together with what was computed, and keep the latter.

        Args:
            raw: scores of ``known.missing``.
        """
        rows, request = dict(known.rows), known.request
        if raw is not None:
            before = _before(request, whole)
            new = iter(_read_rows(raw))
            for place, segment in enumerate(request.segment_ids):
                if place not in known.rows:
                    rows[place] = self._rows[before, segment] = next(new)
            while len(self._rows) > self.max_pairs:
                self._rows.popitem(last=False)
                self._evictions += 1
        ordered = [rows[place] for place in range(len(request.segment_ids))]
        computed_tokens = raw.computed_tokens if raw else 0
        num_tokens = len(request.prefix_ids) + sum(map(len, request.segment_ids))
        masses = [mass for _, mass in ordered if mass is not None]
        return RawScores(
            labels_CL=torch.tensor([labels for labels, _ in ordered]),
            mass_C=torch.tensor(masses) if whole else None,
            computed_tokens=computed_tokens,
            cached_tokens=num_tokens - computed_tokens,
        )

    def drop(self, adapter: str | None) -> None:
        """Forget the scores of an adapter, whose weights have changed or gone."""
        for key in [key for key in self._rows if key[0][0] == adapter]:
            del self._rows[key]

    @property
    def observed(self) -> CacheObserved:
        """What it did so far and holds now."""
        return CacheObserved(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            num_entries=len(self._rows),
        )


def _before(request: TokenizedRequest, whole: bool) -> _Before:
    ids = np.asarray(request.prefix_ids, dtype=np.int64).tobytes()
    digest = blake2b(ids, digest_size=32).digest()
    return request.adapter, request.cache_salt, digest, request.label_ids, whole


def _read_rows(raw: RawScores) -> Sequence[_Row]:
    labels: list[list[float]] = raw.labels_CL.tolist()
    masses: list[float | None] = [None] * len(labels)
    if raw.mass_C is not None:
        masses = raw.mass_C.tolist()
    return [(tuple(row), mass) for row, mass in zip(labels, masses, strict=True)]
