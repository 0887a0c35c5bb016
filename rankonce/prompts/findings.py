"""What can be asked about a record, and what is true: one function a kind of instruction.

Each finds the words for the slots of a question and its answer, or ``None`` where the record does
not hold the facts. What cannot be told apart by the words of the record is not asked: numbers that
fall into one bucket, names that stand for two events.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

from rankonce.prompts.facts import Record, ToldEvent, ToldItem

T = TypeVar("T")
# Items of a question.
_FEW, _MANY = 2, 4
_MIN_EVENTS_OF_TASTE = 3
_MAX_VALUES_OF_TASTE = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The words for a question and its true answer.

    Attributes:
        case: which of the kind's answers is true.
    """

    slots: Mapping[str, str]
    case: str = "answer"


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What actions of the history say.

    Attributes:
        liking, disliking: those that speak for what an item has, and against it.
    """

    liking: Sequence[str] = ()
    disliking: Sequence[str] = ()


def choose_and_why(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """The one chosen candidate among others, for what it shares with a history item."""
    known = [
        (item, is_chosen)
        for item, is_chosen in zip(record.candidates, record.is_chosen, strict=True)
        if is_chosen is not None
    ]
    chosen = [item for item, is_chosen in known if is_chosen]
    if len(chosen) != 1 or len(known) < _FEW:
        return None
    reason = _reason(chosen[0], record.events, actions.liking, random)
    if reason is None:
        return None
    choices = _write_names([item for item, _ in known])
    return Finding(slots={"choices": choices, "choice": chosen[0].name, **reason})


def yes_or_no_and_why(
    record: Record, actions: Actions, random: np.random.Generator
) -> Finding | None:
    """A candidate that was chosen or not, for what it shares with a history item."""
    found = []
    for item, is_chosen in zip(record.candidates, record.is_chosen, strict=True):
        wanted = actions.liking if is_chosen else actions.disliking
        reason = _reason(item, record.events, wanted, random)
        if is_chosen is not None and reason is not None:
            case = "chosen" if is_chosen else "passed"
            found.append(Finding(case=case, slots={"item": item.name, **reason}))
    # As many of either as there are facts for, whichever candidates are more.
    wanted_case = _pick(sorted({finding.case for finding in found}), random)
    return _pick([finding for finding in found if finding.case == wanted_case], random)


def summarise_taste(
    record: Record, actions: Actions, random: np.random.Generator
) -> Finding | None:
    """The values that most of the items with an action have, of one field."""
    found = []
    for action in actions.liking:
        items = [event.item for event in record.events if event.action == action]
        if len(items) < _MIN_EVENTS_OF_TASTE:
            continue
        for field in dict.fromkeys(field for item in items for field in item.texts):
            counts = Counter(value for item in items for value in item.texts.get(field, ()))
            common = [(value, count) for value, count in counts.most_common() if count > 1]
            # A value that is as frequent as the last one named would be left out for nothing.
            top = [
                (value, count)
                for value, count in common
                if sum(other >= count for _, other in common) <= _MAX_VALUES_OF_TASTE
            ]
            if top:
                summary = ", ".join(f"{value} ({count})" for value, count in top)
                found.append((action, str(len(items)), field, summary))
    one = _pick(found, random)
    if one is None:
        return None
    return Finding(slots=dict(zip(("action", "total", "field", "summary"), one, strict=True)))


def in_common(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """Everything in text that some items share, field by field."""
    items = _items(record)
    groups = [
        group
        for count in (_FEW, _FEW + 1)
        for group in combinations(items, count)
        if _shared(group)
    ]
    group = _pick(groups, random)
    if group is None:
        return None
    common = "; ".join(
        f"{field}: {_write_list(values)}" for field, values in _shared(group).items()
    )
    return Finding(slots={"items": _write_names(group), "common": common})


def odd_one_out(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """The one of some items that lacks a value which all others have."""
    found = []
    items = _items(record)
    for field in dict.fromkeys(field for item in items for field in item.texts):
        # An item without the field may have the value all the same.
        told = [item for item in items if field in item.texts]
        for value in dict.fromkeys(value for item in told for value in item.texts[field]):
            have = [item for item in told if value in item.texts[field]]
            lack = [item for item in told if value not in item.texts[field]]
            if len(have) > 1 and lack:
                found.append((field, value, have, lack))
    one = _pick(found, random)
    if one is None:
        return None
    field, value, have, lack = one
    odd = lack[int(random.integers(len(lack)))]
    group = _shuffle([odd, *_shuffle(have, random)[: _MANY - 1]], random)
    if any(_is_odd(item, group) for item in group if item is not odd):
        return None
    return Finding(
        slots={"items": _write_names(group), "item": odd.name, "field": field, "value": value}
    )


def _is_odd(item: ToldItem, group: Sequence[ToldItem]) -> bool:
    """Whether all others of a group share something that an item may lack."""
    shared = _shared([other for other in group if other is not item])
    return any(
        value not in item.texts.get(field, ())
        for field, values in shared.items()
        for value in values
    )


def fill_in(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """A field in text of an item whose other fields are given; of one that is not told if any."""

    def fields(items: Sequence[ToldItem]) -> list[tuple[ToldItem, str]]:
        return [(item, field) for item in items for field in item.texts]

    one = _pick(fields(record.others) or fields(_items(record)), random)
    if one is None:
        return None
    item, field = one
    return Finding(
        slots={"given": item.write(besides=field), "field": field, "value": item.fields[field]}
    )


def order_by(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """Candidates in the order of a number, or of their names where no number tells them apart."""
    by_field = {
        field: _distinct(record.candidates, field)
        for field in dict.fromkeys(field for item in record.candidates for field in item.numbers)
    }
    field = _pick([field for field, items in by_field.items() if len(items) > _FEW], random)
    if field is None:
        order = "name, from A to Z"
        by_name = {item.name.casefold(): item for item in record.candidates}
        ordered = [item for _, item in sorted(by_name.items())[:_MANY]]
    else:
        is_falling = bool(random.integers(2))
        items = by_field[field][:_MANY]
        ordered = sorted(items, key=lambda item: item.amounts[field], reverse=is_falling)
        ends = ("oldest", "newest") if field in items[0].ages else ("highest", "lowest")
        order = f"{field}, {ends[not is_falling]} first"
    if len(ordered) <= _FEW:
        return None
    return Finding(
        slots={
            "items": _write_names(_shuffle(ordered, random)),
            "order": order,
            "ordered": "; ".join(item.name for item in ordered),
        }
    )


def compare_two(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """Which of two candidates has more of a number."""
    found = [
        (field, pair)
        for pair in combinations(record.candidates, 2)
        for field in pair[0].numbers
        if len(_distinct(pair, field)) == len(pair)
    ]
    one = _pick(found, random)
    if one is None:
        return None
    field, pair = one
    first, second = _shuffle(pair, random)
    is_more = bool(random.integers(2))
    winner, loser = sorted(pair, key=lambda item: item.amounts[field], reverse=is_more)
    if field in winner.ages:
        measure = f"the {'earlier' if is_more else 'later'} date ({field})"
    else:
        measure = f"the {'higher' if is_more else 'lower'} {field}"
    return Finding(
        slots={
            "first": first.name,
            "second": second.name,
            "measure": measure,
            "winner": winner.name,
            "value": winner.numbers[field],
            "loser": loser.name,
            "other_value": loser.numbers[field],
        }
    )


def true_or_false(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """Whether an item has a value: one of its own, or one that another item has and it lacks."""
    items = _items(record)
    one = _pick([(item, field) for item in items for field in item.texts], random)
    if one is None:
        return None
    item, field = one
    own = item.texts[field]
    others = {value for other in items for value in other.texts.get(field, ())}
    lacked = sorted(others - set(own))
    if lacked and random.integers(2):
        value, case = lacked[int(random.integers(len(lacked)))], "wrong"
    else:
        value, case = own[int(random.integers(len(own)))], "right"
    slots = {"item": item.name, "field": field, "value": value, "actual": _write_list(own)}
    return Finding(case=case, slots=slots)


def which_came_first(
    record: Record, actions: Actions, random: np.random.Generator
) -> Finding | None:
    """Which of two events was earlier."""
    pairs = [
        (earlier, later)
        for earlier, later in combinations(_single_events(record), 2)
        if earlier.time < later.time
    ]
    pair = _pick(pairs, random)
    if pair is None:
        return None
    first, second = _shuffle(pair, random)
    return Finding(
        slots={
            "first": first.item.name,
            "second": second.item.name,
            "earlier": pair[0].item.name,
            "later": pair[1].item.name,
        }
    )


def recall_action(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """What the member did with an item of the history."""
    event = _pick(_single_events(record), random)
    if event is None or len({one.action for one in record.events}) == 1:
        return None
    return Finding(slots={"item": event.item.name, "action": event.action})


def count_actions(record: Record, actions: Actions, random: np.random.Generator) -> Finding | None:
    """How many events have an action."""
    happened = [event.action for event in record.events]
    history = record.task.history
    known = history.actions if history is not None and history.actions else happened
    action = _pick(sorted(set(known)), random)
    if action is None or not happened:
        return None
    count = happened.count(action)
    return Finding(
        case="some" if count else "none",
        slots={"action": action, "count": str(count), "total": str(len(happened))},
    )


def _reason(
    item: ToldItem,
    events: Sequence[ToldEvent],
    actions: Sequence[str],
    random: np.random.Generator,
) -> dict[str, str] | None:
    """Find what an item shares with one that the member did something with."""
    found = [
        (field, values, event)
        for event in events
        if event.action in actions and event.item.name != item.name
        for field, values in _shared([item, event.item]).items()
    ]
    one = _pick(found, random)
    if one is None:
        return None
    field, values, event = one
    return {
        "field": field,
        "values": _write_list(values),
        "event": event.item.name,
        "action": event.action,
    }


def _items(record: Record) -> list[ToldItem]:
    """Every item that is told, each name once; none of whose name two things are known."""
    told = [*record.candidates, *(event.item for event in record.events)]
    by_name: dict[str, list[ToldItem]] = {}
    for item in told:
        by_name.setdefault(item.name, []).append(item)
    others = {item.name: [item] for item in record.others}
    return [
        # As a candidate, an item is described in more fields than in the history.
        max(items, key=lambda item: len(item.texts))
        for name, items in by_name.items()
        if _agree([*items, *others.get(name, [])])
    ]


def _agree(items: Sequence[ToldItem]) -> bool:
    """Whether what is told of one thing several times is always the same."""
    return all(
        one.texts.get(field, values) == values
        for one in items
        for other in items
        for field, values in other.texts.items()
    )


def _single_events(record: Record) -> list[ToldEvent]:
    """Events whose item stands once in the history."""
    counts = Counter(event.item.name for event in record.events)
    return [event for event in record.events if counts[event.item.name] == 1]


def _shared(items: Sequence[ToldItem]) -> dict[str, list[str]]:
    """The values in text that all items have, by field."""
    first, *rest = items
    shared = {
        field: [v for v in values if all(v in item.texts.get(field, ()) for item in rest)]
        for field, values in first.texts.items()
    }
    return {field: values for field, values in shared.items() if values}


def _distinct(items: Sequence[ToldItem], field: str) -> list[ToldItem]:
    """Items of which no two have the same words for a number."""
    return list({item.numbers[field]: item for item in items if field in item.numbers}.values())


def _pick(options: Sequence[T], random: np.random.Generator) -> T | None:
    return options[int(random.integers(len(options)))] if options else None


def _shuffle(options: Sequence[T], random: np.random.Generator) -> list[T]:
    return [options[place] for place in random.permutation(len(options)).tolist()]


def _write_list(values: Sequence[str]) -> str:
    return ", ".join(values[:-1]) + f" and {values[-1]}" if len(values) > 1 else values[0]


def _write_names(items: Sequence[ToldItem]) -> str:
    # Names may have commas in them.
    return "; ".join(item.name for item in items)
