"""What a record says, in words: the facts that instructions ask about and are true by.

Values are spelled as the task spells them, so that a fact reads as in a ranking prompt. What is not
told to the model (long texts, events before the last ones) is no fact here either.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rankonce.errors import RequestError
from rankonce.prompts.spelling import FieldSpec, spell
from rankonce.prompts.tasks import Lines, Task
from rankonce.records import TrainingExample, Value

# Longer texts are no names, and no values to compare.
_MAX_NAME, _MAX_VALUE = 160, 40
_NAMES = ("title", "name")
_HISTORY = ("What the member did, oldest first:", "History, oldest first:", "The member so far:")
_NO_HISTORY = ("Nothing is known of the member yet.", "No history yet.")
_CANDIDATES = ("Candidates:", "These can be chosen:", "The list:")


@dataclass(frozen=True, kw_only=True)
class ToldItem:
    """An item in words.

    Attributes:
        name: what it is called.
        texts: its text and list fields, each with its values.
        numbers: its numeric fields, as words.
        amounts: the numbers behind these.
        ages: the numeric fields that are ages in seconds.
    """

    name: str
    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, str]
    amounts: Mapping[str, float]
    ages: frozenset[str]

    @property
    def fields(self) -> dict[str, str]:
        """Every field but the name, in words."""
        return {name: ", ".join(values) for name, values in self.texts.items()} | dict(self.numbers)

    def write(self, *, besides: str = "") -> str:
        """Write the item on one line, perhaps without one of its fields."""
        told = [f"{name}: {words}" for name, words in self.fields.items() if name != besides]
        return " · ".join([self.name, *told])


@dataclass(frozen=True, kw_only=True)
class ToldEvent:
    """An event of the history in words."""

    item: ToldItem
    action: str
    time: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is told of a labelled request, and what is known beside it.

    Attributes:
        profile: fields of the member or query, in words.
        events: the newest ones, oldest first.
        candidates: some of those whose name no other has.
        is_chosen: for each of these whether the member chooses it: true for the label that ranks
            highest, false for the others (for graded labels, the lowest), else ``None``. Where
            what ranks is not wanted, false for the highest and ``None`` for the others.
        others: such candidates that are not told.
        text: all of it, as the model reads it.
    """

    task: Task
    profile: Mapping[str, str]
    events: tuple[ToldEvent, ...]
    candidates: tuple[ToldItem, ...]
    is_chosen: tuple[bool | None, ...]
    others: tuple[ToldItem, ...]
    text: str


def tell_record(
    example: TrainingExample,
    task: Task,
    random: np.random.Generator,
    *,
    max_events: int,
    max_candidates: int,
) -> Record:
    """Put a labelled request into words.

    Where the member chose something, one chosen candidate is among those that are told.

    Raises:
        RequestError: names the field that the task does not know, or whose value has another type.
    """
    request = example.request
    events = []
    if task.history is not None:
        in_time = sorted(request.history, key=lambda event: event.time)[-max_events:]
        for event in in_time:
            item = _tell_item(event.item.fields, task.history, "history.item.fields")
            if item is not None:
                action = " ".join(event.action.split())
                events.append(ToldEvent(item=item, action=action, time=event.time))
    pairs: dict[str, list[tuple[ToldItem, bool | None]]] = {}
    for index, candidate in enumerate(request.candidates):
        item = _tell_item(candidate.fields, task.candidate, f"candidates[{index}].fields")
        if item is not None:
            pair = (item, _is_chosen(task, example.labels[index]))
            pairs.setdefault(item.name, []).append(pair)
    # A name that two candidates have says nothing of either.
    single = [same[0] for same in pairs.values() if len(same) == 1]
    order = [single[place] for place in random.permutation(len(single)).tolist()]
    chosen = [pair for pair in order if pair[1]][:1]
    rest = [pair for pair in order if pair not in chosen and not (chosen and pair[1])]
    told = [*chosen, *rest][:max_candidates]
    told = [told[place] for place in random.permutation(len(told)).tolist()]
    profile = {
        _words_of(name): spell(value, _spec(task.profile, name, "profile"), path=f"profile.{name}")
        for name, value in request.profile.items()
        if value is not None and not (isinstance(value, str) and not value.strip())
    }
    return Record(
        task=task,
        profile=profile,
        events=tuple(events),
        candidates=tuple(item for item, _ in told),
        is_chosen=tuple(is_chosen for _, is_chosen in told),
        others=tuple(item for item, _ in order if item not in [item for item, _ in told]),
        text=_write(task, profile, events, [item for item, _ in told], random),
    )


def _write(
    task: Task,
    profile: Mapping[str, str],
    events: list[ToldEvent],
    candidates: list[ToldItem],
    random: np.random.Generator,
) -> str:
    def one_of(phrases: tuple[str, ...]) -> str:
        return phrases[int(random.integers(len(phrases)))]

    lines = [f"{name[:1].upper()}{name[1:]}: {words}" for name, words in profile.items()]
    if events:
        lines += [one_of(_HISTORY), *(f"{event.action}: {event.item.write()}" for event in events)]
    elif task.history is not None:
        lines.append(one_of(_NO_HISTORY))
    if candidates:
        lines += [one_of(_CANDIDATES), *(f"- {item.write()}" for item in candidates)]
    return "\n".join(lines)


def _tell_item(fields: Mapping[str, Value], part: Lines, path: str) -> ToldItem | None:
    """Put an item into words, ``None`` if nothing in it is a name."""
    texts: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, str] = {}
    amounts: dict[str, float] = {}
    ages = set()
    for name, value in fields.items():
        spec = _spec(part, name, path)
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            continue
        words = spell(value, spec, path=f"{path}.{name}")
        if spec.type == "list":
            values = value if isinstance(value, list) else [value]
            texts[name] = tuple(dict.fromkeys(" ".join(str(one).split()) for one in values))
        elif spec.type == "text":
            texts[name] = (words,)
        else:
            numbers[_words_of(name)], amounts[_words_of(name)] = words, float(value)
            if spec.type == "age":
                ages.add(_words_of(name))
    names = [name for name in _name_fields(part) if name in texts]
    names = [name for name in names if len(texts[name][0]) <= _MAX_NAME]
    if not names:
        return None
    (name,) = texts.pop(names[0])
    return ToldItem(
        name=name,
        texts={
            _words_of(field): values
            for field, values in texts.items()
            if max(map(len, values)) <= _MAX_VALUE
        },
        numbers=numbers,
        amounts=amounts,
        ages=frozenset(ages),
    )


def _name_fields(part: Lines) -> list[str]:
    """Fields that may name an item: its title, else what is required, else any other text."""
    texts = [name for name, spec in part.fields.items() if spec.type == "text"]
    return sorted(texts, key=lambda name: (name not in _NAMES, not part.fields[name].required))


def _spec(part: Lines, name: str, path: str) -> FieldSpec:
    if name not in part.fields:
        known = ", ".join(part.fields) or "none"
        raise RequestError(f"{path}.{name}: unknown field; the task knows {known}")
    return part.fields[name]


def _words_of(name: str) -> str:
    words = name.replace("_", " ")
    return f"number of {words.removeprefix('num ')}" if words.startswith("num ") else words


def _is_chosen(task: Task, label: str | Mapping[str, float] | None) -> bool | None:
    if not isinstance(label, str):
        return None
    if label not in task.label_names:
        raise RequestError(f"labels: should be of {', '.join(task.label_names)}, is {label!r}")
    grades = dict(zip(task.label_names, task.grades, strict=True))
    if not task.ranking.wanted:
        # What is not dismissed is not chosen yet.
        return False if grades[label] == max(grades.values()) else None
    if grades[label] == max(grades.values()):
        return True
    return False if grades[label] == min(grades.values()) else None
