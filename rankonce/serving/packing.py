"""Prompts that share their beginning become one request: the beginning is its prefix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankonce.layout import TokenizedRequest


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Prompts as token ids, what all of them begin with kept once.

    Attributes:
        head: that beginning, as far as it is known without a look at the ids.
        tails: the rest of each, which holds at least one token unless the prompt has none.
    """

    head: tuple[int, ...]
    tails: list[tuple[int, ...]]

    @classmethod
    def join(
        cls, query: tuple[int, ...], items: Sequence[tuple[int, ...]], *, item_first: bool
    ) -> "EncodedPrompts":
        """Put the ids of a query before or after those of every item."""
        if item_first:
            return cls(head=(), tails=[item + query for item in items])
        if all(items):
            return cls(head=query, tails=list(items))
        return cls(head=query[:-1], tails=[query[-1:] + item for item in items])

    @property
    def whole(self) -> list[tuple[int, ...]]:
        """Every prompt from its first token on."""
        return [self.head + tail for tail in self.tails]


@dataclass(frozen=True, kw_only=True)
class PackedPrompts:
    """Prompts as requests.

    Attributes:
        requests: groups of prompts that share their beginning.
        places: for each request the prompts that its segments are.
        num_tokens: of all prompts, each whole.
    """

    requests: list[TokenizedRequest]
    places: list[list[int]]
    num_tokens: int


def pack_prompts(
    prompts: EncodedPrompts, label_ids: Sequence[int], *, adapter: str | None = None
) -> PackedPrompts:
    """Group prompts by their beginnings so that few tokens go through the model.

    In sorted order prompts that share a beginning are neighbours. Neighbours become one request
    where one beginning for all saves more tokens than several longer ones for some.
    """
    head, tails = prompts.head, prompts.tails
    keys = [np.array(ids, dtype=">u4").tobytes() for ids in tails]
    order = sorted(range(len(tails)), key=keys.__getitem__)
    arrays = [np.frombuffer(keys[index], dtype=">u4") for index in order]
    shared = [len(head) + _shared(one, other) for one, other in pairwise(arrays)]
    labels = tuple((label_id,) for label_id in label_ids)
    requests, places = [], []
    for group in _group(shared):
        indices = order[group.first : group.last + 1]
        first = tails[indices[0]]
        alone = len(indices) == 1
        # One that is like no other here may be like one of another question: all but its last token
        # is what the prefix cache can know.
        begin = len(first) - 1 if alone else group.shared - len(head)
        requests.append(
            TokenizedRequest(
                prefix_ids=head + first[:begin],
                segment_ids=tuple(tails[index][begin:] for index in indices),
                label_ids=labels,
                adapter=adapter,
            )
        )
        places.append(indices)
    num_tokens = len(head) * len(tails) + sum(map(len, tails))
    return PackedPrompts(requests=requests, places=places, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Neighbours ``first..last`` with ``shared`` tokens in common."""

    first: int
    last: int
    shared: int


@dataclass(kw_only=True)
class _Run:
    """Neighbours that have at least ``shared`` tokens in common, cut at where it is no more."""

    shared: int
    parts: list["_Choice"] = field(default_factory=list)

    def choose(self) -> "_Choice":
        """Take the run whole, or each part as it is, whichever saves more tokens."""
        first, last = self.parts[0].first, self.parts[-1].last
        whole = (last - first) * self.shared
        parted = sum(part.saved for part in self.parts)
        if whole > parted:
            group = _Group(first=first, last=last, shared=self.shared)
            return _Choice(first=first, last=last, saved=whole, groups=[group])
        groups = [group for part in self.parts for group in part.groups]
        return _Choice(first=first, last=last, saved=parted, groups=groups)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How neighbours ``first..last`` are grouped, and the tokens that this saves."""

    first: int
    last: int
    saved: int
    groups: list[_Group]


def _group(shared: Sequence[int]) -> list[_Group]:
    """Group neighbours, given how many tokens each shares with the next one."""
    runs: list[_Run] = []
    for index, common in enumerate([*shared, -1]):
        alone = _Group(first=index, last=index, shared=0)
        choice = _Choice(first=index, last=index, saved=0, groups=[alone])
        while runs and runs[-1].shared > common:
            runs[-1].parts.append(choice)
            choice = runs.pop().choose()
        if not runs or runs[-1].shared < common:
            runs.append(_Run(shared=common))
        runs[-1].parts.append(choice)
    return runs[0].parts[0].groups


def _shared(one: NDArray[Any], other: NDArray[Any]) -> int:
    """Count the tokens that two prompts begin with, leaving each at least one of its own."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if different.size else length - 1
