"""History policies: which events stand in the prompt, always oldest first.

A policy orders the events by how much it wants to keep them. They are then taken in that order
until the event bound or the token budget is reached; whatever is left out is reported by index.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest

from rankonce.prompts.tasks import HistoryLines
from rankonce.records import Event, HistoryReport, Item

Policy = Callable[[Sequence[Event], Sequence[Item]], list[int]]


def _newest_first(events: Sequence[Event], candidates: Sequence[Item]) -> list[int]:
    # Among equal times the later entry counts as newer.
    return sorted(range(len(events)), key=lambda index: (events[index].time, index), reverse=True)


def _balanced(events: Sequence[Event], candidates: Sequence[Item]) -> list[int]:
    """The newest of every action, then the second newest of every action, and so on."""
    by_action: dict[str, list[int]] = defaultdict(list)
    for index in _newest_first(events, candidates):
        by_action[events[index].action].append(index)
    rounds = zip_longest(*by_action.values())
    return [index for turn in rounds for index in turn if index is not None]


def _similar(events: Sequence[Event], candidates: Sequence[Item]) -> list[int]:
    """Events that share most words with the candidates' fields (Jaccard index of the words)."""
    wanted = set().union(*(_words(candidate) for candidate in candidates))

    def likeness(index: int) -> float:
        words = _words(events[index].item)
        return len(words & wanted) / (len(words | wanted) or 1)

    return sorted(_newest_first(events, candidates), key=likeness, reverse=True)


def _words(item: Item) -> set[str]:
    parts = [value if isinstance(value, list) else [value] for value in item.fields.values()]
    texts = [part for values in parts for part in values if isinstance(part, str)]
    return set(re.findall(r"\w+", " ".join(texts).lower()))


POLICIES: dict[str, Policy] = {
    "chronological": _newest_first,
    "recent": _newest_first,
    "balanced": _balanced,
    "similar": _similar,
}


def choose_events(
    events: Sequence[Event],
    candidates: Sequence[Item],
    event_tokens: Sequence[int],
    spec: HistoryLines,
    *,
    max_tokens: int,
) -> tuple[list[int], HistoryReport]:
    """Choose the events that stand in the prompt.

    Of those that the policy picks, the oldest are dropped first when the budget is short.

    Args:
        event_tokens: tokens of every written event.
        max_tokens: the budget in force: the task's, or less where the model's context is short.

    Returns:
        Indices into ``events``, oldest first, and the report of what was dropped.
    """
    picked = POLICIES[spec.policy](events, candidates)[: spec.max_events]
    left_out = set(range(len(events))) - set(picked)
    reason = f"not among the {spec.max_events} events of policy {spec.policy}"
    dropped = dict.fromkeys(left_out, reason)
    kept: list[int] = []
    used = 0
    newest_first = sorted(picked, key=lambda index: (events[index].time, index), reverse=True)
    for place, index in enumerate(newest_first):
        used += event_tokens[index]
        if used > max_tokens:
            over = f"over the budget of {max_tokens} history tokens"
            dropped.update(dict.fromkeys(newest_first[place:], over))
            break
        kept.append(index)
    report = HistoryReport(
        policy=spec.policy,
        num_events=len(events),
        num_kept=len(kept),
        dropped=dict(sorted(dropped.items())),
    )
    return kept[::-1], report
