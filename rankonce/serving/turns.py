"""Who takes part in the next pass.

Urgent questions come before the others: a lower ``priority`` is served first, strictly. Among those
of one priority a short question, which fills at most a quarter of a pass, waits for nothing but
other short ones, first come, first served. Long ones take turns: where both wait, a quarter of the
pass is theirs, what the short ones leave comes on top, and one that does not fit is cut between
candidates and goes to the back. So a question of 10,000 candidates delays one of 10 by the pass
that runs, and any number of short questions leave a long one a quarter of every pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress, groupby

import numpy as np

from rankonce.layout import TokenizedRequest
from rankonce.model.scoring import OpenRequest, PassScorer, RawScores

# A short question fills at most this part of a pass, and this part is kept for long ones.
_PART = 4
# A question that was cut holds the keys and values of its prefix: so many are under way at most.
_MAX_CUT = 8

# A request and the candidate before which its part of the pass ends.
Turn = tuple[OpenRequest, int]


@dataclass(kw_only=True, eq=False)
class Question:
    """The requests of one question on their way through passes.

    Attributes:
        requests: all of one adapter.
        whole, num_top: what is asked of the model, as in ``OpenRequest``.
        priority: lower ones are served first.
        deadline: the moment after which nobody wants the answer, or ``None``.
        arrived: the moment at which it began to wait.
        since: the moment of its last turn, or of its arrival.
        started: the moment of its first turn.
        num_tokens: that have had no turn yet, as if the cache were empty.
        candidate_tokens: of those, the candidates' own, which no cache spares.
        opened: the requests that had a turn.
    """

    requests: Sequence[TokenizedRequest]
    whole: bool = False
    num_top: int = 0
    priority: int = 0
    deadline: float | None = None
    arrived: float = 0.0
    since: float = field(init=False)
    started: float | None = None
    num_tokens: int = field(init=False)
    candidate_tokens: int = field(init=False)
    opened: list[OpenRequest] = field(default_factory=list)
    # The candidate that is next, and what the cache knows of the prefix before it.
    _candidate: int = 0
    _known: int | None = None
    _ends: list[int] | None = None

    def __post_init__(self) -> None:
        self.since = self.arrived
        self.candidate_tokens = sum(sum(map(len, request.segment_ids)) for request in self.requests)
        prefix_tokens = sum(len(request.prefix_ids) for request in self.requests)
        self.num_tokens = prefix_tokens + self.candidate_tokens

    @property
    def adapter(self) -> str | None:
        """Whose weights its passes run with."""
        return self.requests[0].adapter

    @property
    def is_cut(self) -> bool:
        """Whether an earlier pass left the keys and values of a prefix for the next one."""
        return self._candidate > 0

    @property
    def is_done(self) -> bool:
        """Whether every candidate of every request has had its turn."""
        return len(self.opened) == len(self.requests) and not self.is_cut

    @property
    def left_tokens(self) -> int:
        """Tokens that are still to be computed, as far as the cache has been asked."""
        return self.num_tokens - (self._known or 0)

    @property
    def least_tokens(self) -> int:
        """Tokens of the smallest turn: what is left of a prefix, and one candidate."""
        request = self._following()
        prefix = 0 if self.is_cut else len(request.prefix_ids) - (self._known or 0)
        return prefix + len(request.segment_ids[self._candidate])

    def look_up(self, scorer: PassScorer) -> None:
        """Ask the cache, once, what it knows of the next prefix."""
        if self._known is None and not self.is_cut:
            self._known = scorer.count_known(self._following())

    def take(
        self, scorer: PassScorer, room: int, *, at_least_one: bool = False
    ) -> tuple[list[Turn], int]:
        """Take the candidates that fit into a number of tokens, in their order.

        Args:
            at_least_one: take a candidate even where none fits.

        Returns:
            The turns, and the tokens that they compute.
        """
        turns: list[Turn] = []
        spent = 0
        while not self.is_done:
            request, first = self._following(), self._candidate
            known = scorer.count_known(request) if first == 0 else len(request.prefix_ids)
            prefix = len(request.prefix_ids) - known
            if self._ends is None:
                self._ends = list(accumulate(map(len, request.segment_ids), initial=0))
            ends = self._ends
            last = int(np.searchsorted(ends, ends[first] + room - spent - prefix, side="right")) - 1
            last = min(last, len(request.segment_ids))
            if last <= first:
                if turns or not at_least_one:
                    break
                last = first + 1
            if first == 0:
                self.opened.append(
                    scorer.open_request(request, whole=self.whole, num_top=self.num_top)
                )
                self.num_tokens -= len(request.prefix_ids)
            turns.append((self.opened[-1], last))
            spent += prefix + ends[last] - ends[first]
            self.num_tokens -= ends[last] - ends[first]
            self.candidate_tokens -= ends[last] - ends[first]
            self._known = None
            if last < len(request.segment_ids):
                self._candidate = last
                break
            self._candidate, self._ends = 0, None
        return turns, spent

    def join(self) -> list[RawScores]:
        """Join the scores of every request, which waits for the device."""
        return [request.join() for request in self.opened]

    def _following(self) -> TokenizedRequest:
        return self.requests[len(self.opened) - self.is_cut]


def plan_turns(
    questions: Sequence[Question], scorer: PassScorer, *, max_tokens: int
) -> list[tuple[Question, list[Turn]]]:
    """Choose who takes part in the next pass, all of one adapter.

    Args:
        questions: at least one, none of them done.
        max_tokens: computed tokens of the pass; a prompt that is longer runs by itself.
    """
    order = sorted(questions, key=lambda question: (question.priority, question.since))
    alike = [question for question in order if question.adapter == order[0].adapter]
    plan = _Plan(scorer, max_tokens, num_cut=sum(question.is_cut for question in questions))
    for _, level in groupby(alike, key=lambda question: question.priority):
        plan.fill(list(level))
    if not plan.turns:
        plan.take(order[0], at_least_one=True)
    return plan.turns


class _Plan:
    """A pass that is being filled."""

    def __init__(self, scorer: PassScorer, max_tokens: int, *, num_cut: int) -> None:
        self.turns: list[tuple[Question, list[Turn]]] = []
        self._scorer = scorer
        self._max_tokens = max_tokens
        self._room = max_tokens
        self._num_cut = num_cut

    def fill(self, questions: Sequence[Question]) -> None:
        """Take from questions of one priority, those that waited longest first."""
        if self._room <= 0:
            return
        for question in questions:
            question.look_up(self._scorer)
        part = self._max_tokens // _PART
        is_short = [one.left_tokens <= part and not one.is_cut for one in questions]
        short = list(compress(questions, is_short))
        long = [one for one, short_one in zip(questions, is_short, strict=True) if not short_one]
        kept = max(part, long[0].least_tokens) if long else 0
        left = self._take_whole(short, room=self._room - kept)
        for place, question in enumerate(long):
            may_start = question.is_cut or self._num_cut < _MAX_CUT
            is_worth_it = question.left_tokens > self._max_tokens and self._room >= part
            if question.left_tokens <= self._room or (may_start and (not place or is_worth_it)):
                # Room was kept for the first: where even that is too little, it runs by itself.
                self.take(question, at_least_one=not place and not self.turns)
        self._take_whole(left, room=self._room)

    def take(self, question: Question, *, at_least_one: bool = False) -> None:
        """Take of one question what fits."""
        was_cut = question.is_cut
        turns, spent = question.take(self._scorer, self._room, at_least_one=at_least_one)
        if turns:
            self.turns.append((question, turns))
            self._room -= spent
            self._num_cut += question.is_cut - was_cut

    def _take_whole(self, questions: Sequence[Question], *, room: int) -> list[Question]:
        """Take short questions in their order; returns those that no longer fit."""
        for place, question in enumerate(questions):
            if question.left_tokens > room:
                return list(questions[place:])
            room -= question.left_tokens
            self.take(question)
        return []
