"""The suite's arms: the same requests with something given, taken away or mixed up.

examples N   N solved candidates of earlier requests stand in the prompt
history N    the newest N events stand in the prompt, or all, whatever the task's policy takes
titles       titles change places among items, the same way everywhere
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rankonce.evaluation.suite_data import SuiteRequest, TaskRequests
from rankonce.prompts.tasks import Task, field_names
from rankonce.records import Event, Item, ScoreRequest, SolvedCandidate, Value

# Fields that hold what an item is called, the likeliest first.
_TITLES = ("title", "text", "name")
# More tokens than any context has.
_NO_BOUND = 1_000_000_000


class InapplicableArmError(Exception):
    """An arm that says nothing of a task; the message tells why."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A change of all requests of a task.

    Attributes:
        name: for people.
        family: examples, history or titles.
        size: examples or events, ``None`` for all events; 0 for titles.
        change: makes the requests; raises ``InapplicableArmError``.
        ask: makes the task that they are asked in.
    """

    name: str
    family: str
    size: int | None
    change: Callable[[Task, TaskRequests], list[ScoreRequest]]
    ask: Callable[[Task], Task] = lambda task: task


def make_arms(
    *,
    examples: Sequence[int] = (2, 8),
    history: Sequence[int | None] = (0, 5, 20, 50, None),
    titles: bool = True,
    seed: int = 0,
) -> tuple[Arm, ...]:
    """Make the arms beside the requests as they are, without examples, by the task's policy."""
    shown = [
        Arm(
            name=f"{count} examples",
            family="examples",
            size=count,
            change=partial(_show_examples, count=count, seed=seed),
        )
        for count in examples
    ]
    kept = [
        Arm(
            name=f"{'all' if count is None else count} events",
            family="history",
            size=count,
            change=partial(_keep_events, count=count),
            ask=_write_all_events,
        )
        for count in history
    ]
    mixed = Arm(
        name="titles shuffled",
        family="titles",
        size=0,
        change=partial(_shuffle_titles, seed=seed),
    )
    return (*shown, *kept, *((mixed,) if titles else ()))


def _show_examples(
    task: Task, requests: TaskRequests, *, count: int, seed: int
) -> list[ScoreRequest]:
    """Put solved candidates of earlier requests into every prompt, the labels in turn.

    A smaller number takes the first of a larger one, so that arms differ by what was added.
    """
    pools = _Pools(task, requests.earlier)
    return [
        replace(
            one.example.request,
            examples=pools.draw(one.example.request, count, np.random.default_rng([seed, number])),
        )
        for number, one in enumerate(requests.later)
    ]


class _Pools:
    """Solved candidates by label, in the order of time."""

    def __init__(self, task: Task, earlier: Sequence[SuiteRequest]) -> None:
        self._task = task
        self._solved: dict[str, list[SolvedCandidate]] = {name: [] for name in task.label_names}
        self._times: dict[str, list[float]] = {name: [] for name in task.label_names}
        for one in earlier:
            request = one.example.request
            for item, label in zip(request.candidates, one.example.labels, strict=True):
                if isinstance(label, str) and label in self._solved:
                    self._solved[label].append(SolvedCandidate(item=item, label=label))
                    # Without times the order of the data stands for them: all of it is earlier.
                    self._times[label].append(
                        float("-inf") if request.time is None else request.time
                    )

    def draw(
        self, request: ScoreRequest, count: int, random: np.random.Generator
    ) -> tuple[SolvedCandidate, ...]:
        """Draw different ones that were asked strictly before the request."""
        before = float("inf") if request.time is None else request.time
        orders = {}
        for label, times in self._times.items():
            known = bisect_left(times, before)
            # More than are wanted: every label draws the same numbers for every count.
            most = min(known, 64)
            orders[label] = random.choice(known, size=most, replace=False).tolist() if most else []
        turn = random.permutation(list(self._solved)).tolist()
        drawn: list[SolvedCandidate] = []
        for round_ in range(max(map(len, orders.values()), default=0)):
            for label in turn:
                if round_ < len(orders[label]):
                    drawn.append(self._solved[label][orders[label][round_]])
        if len(drawn) < count:
            raise InapplicableArmError(
                f"only {len(drawn)} solved candidates are earlier than a request"
            )
        return tuple(drawn[:count])


def _write_all_events(task: Task) -> Task:
    """Let the prompt hold every event, as far as the model's context goes."""
    if task.history is None:
        return task
    lifted = {"policy": "chronological", "max_events": None, "max_tokens": _NO_BOUND}
    return task.model_copy(update={"history": task.history.model_copy(update=lifted)})


def _keep_events(task: Task, requests: TaskRequests, *, count: int | None) -> list[ScoreRequest]:
    """Keep the newest events; of equal times the later entries are newer."""
    if task.history is None:
        raise InapplicableArmError("the task has no history")
    if not any(one.whole_history for one in requests.later):
        raise InapplicableArmError("no request has a history")
    return [
        replace(one.example.request, history=newest_events(one.whole_history, count))
        for one in requests.later
    ]


def newest_events(events: Sequence[Event], count: int | None) -> tuple[Event, ...]:
    """Take the newest events, in their own order; all of them for ``None``."""
    if count is None:
        return tuple(events)
    order = sorted(range(len(events)), key=lambda place: (events[place].time, place))
    return tuple(events[place] for place in sorted(order[len(order) - count :]))


def _shuffle_titles(task: Task, requests: TaskRequests, *, seed: int) -> list[ScoreRequest]:
    """Give every title another one's name; who shares what with whom stays as it is."""
    asked = [one.example.request for one in requests.later]
    candidate = title_field(task.candidate.lines)
    event = None if task.history is None else title_field(task.history.lines)
    titles = {_text(item.fields, candidate) for one in asked for item in one.candidates}
    titles |= {_text(entry.item.fields, event) for one in asked for entry in one.history}
    known = sorted(title for title in titles if title is not None)
    if len(known) < 2:
        raise InapplicableArmError("the items have no titles to change")
    order = np.random.default_rng(seed).permutation(len(known)).tolist()
    # A circle: no title keeps its place.
    renamed = {known[a]: known[b] for a, b in zip(order, [*order[1:], order[0]], strict=True)}
    return [
        replace(
            request,
            profile={name: _rename(value, renamed) for name, value in request.profile.items()},
            candidates=tuple(_renamed(item, candidate, renamed) for item in request.candidates),
            history=tuple(
                replace(entry, item=_renamed(entry.item, event, renamed))
                for entry in request.history
            ),
        )
        for request in asked
    ]


def title_field(lines: Sequence[str]) -> str | None:
    """Find the field that says what an item is called, else the first that is written."""
    written = [
        name for line in lines for name in field_names(line) if name not in ("action", "age")
    ]
    return next((name for name in _TITLES if name in written), written[0] if written else None)


def _text(fields: Mapping[str, Value], name: str | None) -> str | None:
    value = None if name is None else fields.get(name)
    return value if isinstance(value, str) else None


def _renamed(item: Item, name: str | None, renamed: Mapping[str, str]) -> Item:
    title = _text(item.fields, name)
    if name is None or title is None:
        return item
    return replace(item, fields={**item.fields, name: renamed[title]})


def _rename(value: Value, renamed: Mapping[str, str]) -> Value:
    """A profile may name items as well: the source of a page, or films liked on joining."""
    if isinstance(value, list | tuple):
        return [renamed.get(part, part) for part in value]
    return renamed.get(value, value) if isinstance(value, str) else value
