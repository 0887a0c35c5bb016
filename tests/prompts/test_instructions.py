"""Every answer is true: it is computed again from the request itself, for many tasks and kinds."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankonce.errors import RequestError, TaskError
from rankonce.prompts.facts import Record, tell_record
from rankonce.prompts.findings import Finding
from rankonce.prompts.instructions import (
    KINDS,
    Instruction,
    QuestionConfig,
    ask_about,
    library_instructions,
    load_instruction,
)
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.records import Event, Item, ScoreRequest, TrainingExample
from tests.datasets.test_simulator import examples_of

TASKS = {
    "job-apply": "jobs",
    "job-similar": "jobs",
    "post-reaction": "feed",
    "post-like": "feed",
    "product-rating": "shopping",
    "product-purchase": "shopping",
    "search-relevance": "shopping",
    "song-like": "music",
    "song-similar": "music",
}
BY_KIND = {one.kind: one for one in library_instructions()}
LIKING = BY_KIND["choose-and-why"].actions_for
DISLIKING = BY_KIND["yes-or-no-and-why"].actions_against
MAX_EVENTS = 12


@cache
def records(task: str) -> list[tuple[TrainingExample, Record]]:
    made = []
    for number, simulated in enumerate(examples_of(TASKS[task], task)[:60]):
        example = simulated.example
        random = np.random.default_rng(number)
        record = tell_record(
            example, library_tasks()[task], random, max_events=MAX_EVENTS, max_candidates=5
        )
        made.append((example, record))
    return made


# Their "Yes" says that the member does not want it.
UNWANTED = {"job-dismiss", "post-hide", "movie-dislike"}


class Truth:
    """The request itself, asked without any of the code under test."""

    def __init__(self, example: TrainingExample) -> None:
        self.task: Task = library_tasks()[example.request.task]
        names = Counter(map(self.name, example.request.candidates))
        # Candidates that share a name are not told.
        self.candidates = [
            (item, label)
            for item, label in zip(example.request.candidates, example.labels, strict=True)
            if names[self.name(item)] == 1
        ]
        self.events = sorted(example.request.history, key=lambda e: e.time)[-MAX_EVENTS:]
        self.items = [item for item, _ in self.candidates] + [e.item for e in self.events]

    @staticmethod
    def name(item: Item) -> Any:
        return item.fields["title"] if "title" in item.fields else item.fields["text"]

    @staticmethod
    def values(item: Item, field: str) -> list[str]:
        value = item.fields.get(field.replace(" ", "_"))
        return value if isinstance(value, list) else [] if value is None else [str(value)]

    def has(self, name: str, field: str, value: str) -> bool:
        return any(
            value in self.values(item, field) for item in self.items if self.name(item) == name
        )

    def number(self, name: str, field: str) -> float:
        key = f"num_{field.removeprefix('number of ')}" if field.startswith("number of ") else field
        (value,) = {
            item.fields[key.replace(" ", "_")]
            for item, _ in self.candidates
            if self.name(item) == name
        }
        return float(value)

    def labels(self, name: str) -> list[Any]:
        return [label for item, label in self.candidates if self.name(item) == name]

    def best_and_worst(self) -> tuple[str | None, list[str]]:
        names = [label.name for label in self.task.labels]
        if self.task.name in UNWANTED:
            # Of what is hidden it is known that it is not chosen, of all else nothing.
            return None, ["Yes"]
        if self.task.ranking.label is not None:
            return self.task.ranking.label, [n for n in names if n != self.task.ranking.label]
        grades = {label.name: float(label.grade or 0) for label in self.task.labels}
        return max(grades, key=grades.__getitem__), [min(grades, key=grades.__getitem__)]


def split(text: str) -> list[str]:
    return text.split("; ")


def parts(text: str) -> list[str]:
    """Undo "a, b and c"."""
    *first, last = text.split(" and ")
    return [*", ".join(first).split(", "), last] if first else [last]


def check_reason(truth: Truth, slots: Any, name: str, actions: Any) -> None:
    events = [
        event
        for event in truth.events
        if truth.name(event.item) == slots["event"] and event.action == slots["action"]
    ]
    assert slots["action"] in actions
    for value in parts(slots["values"]):
        assert truth.has(name, slots["field"], value)
        assert any(value in truth.values(event.item, slots["field"]) for event in events)


def check_choose_and_why(truth: Truth, finding: Finding) -> None:
    slots, (best, worst) = finding.slots, truth.best_and_worst()
    choices = split(slots["choices"])
    assert slots["choice"] in choices
    for name in choices:
        assert truth.labels(name)[0] in ([best] if name == slots["choice"] else worst)
    check_reason(truth, slots, slots["choice"], LIKING)


def check_yes_or_no(truth: Truth, finding: Finding) -> None:
    best, worst = truth.best_and_worst()
    is_chosen = finding.case == "chosen"
    assert truth.labels(finding.slots["item"])[0] in ([best] if is_chosen else worst)
    check_reason(truth, finding.slots, finding.slots["item"], LIKING if is_chosen else DISLIKING)


def check_taste(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    events = [event for event in truth.events if event.action == slots["action"]]
    assert slots["total"] == str(len(events))
    counts = Counter(v for e in events for v in truth.values(e.item, slots["field"]))
    named = dict(part.removesuffix(")").rsplit(" (", 1) for part in slots["summary"].split(", "))
    assert all(counts[value] == int(count) > 1 for value, count in named.items())
    left_out = [count for value, count in counts.items() if value not in named and count > 1]
    assert max(left_out, default=0) < min(map(int, named.values()))


def check_in_common(truth: Truth, finding: Finding) -> None:
    for part in split(finding.slots["common"]):
        field, values = part.split(": ", 1)
        for name in split(finding.slots["items"]):
            assert all(truth.has(name, field, value) for value in parts(values))


def check_odd_one_out(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    names = split(slots["items"])
    assert len(names) >= 3
    for name in names:
        assert truth.has(name, slots["field"], slots["value"]) == (name != slots["item"])


def check_fill_in(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    name = slots["given"].split(" · ")[0]
    for value in slots["value"].split(", "):
        assert truth.has(name, slots["field"], value)
    assert f" · {slots['field']}: " not in slots["given"]


def check_order(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    names = split(slots["ordered"])
    assert sorted(names) == sorted(split(slots["items"]))
    field, direction = slots["order"].rsplit(", ", 1)
    if field == "name":
        assert names == sorted(names, key=str.casefold)
        return
    numbers = [truth.number(name, field) for name in names]
    is_falling = direction in ("highest first", "oldest first")
    assert numbers == sorted(numbers, reverse=is_falling)
    assert len(set(numbers)) == len(numbers) >= 3


def check_compare(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    assert {slots["winner"], slots["loser"]} == {slots["first"], slots["second"]}
    _, more, rest = slots["measure"].split(" ", 2)
    field = rest.removeprefix("date (").removesuffix(")")
    winner, loser = (truth.number(slots[key], field) for key in ("winner", "loser"))
    # An age is larger the earlier it began.
    assert winner > loser if more in ("higher", "earlier") else winner < loser
    assert slots["value"] != slots["other_value"]


def check_true_or_false(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    is_right = truth.has(slots["item"], slots["field"], slots["value"])
    assert is_right == (finding.case == "right")
    assert all(truth.has(slots["item"], slots["field"], v) for v in parts(slots["actual"]))


def check_first(truth: Truth, finding: Finding) -> None:
    slots = finding.slots
    times = {truth.name(event.item): event.time for event in truth.events}
    assert times[slots["earlier"]] < times[slots["later"]]
    assert {slots["earlier"], slots["later"]} == {slots["first"], slots["second"]}


def check_recall(truth: Truth, finding: Finding) -> None:
    actions = [e.action for e in truth.events if truth.name(e.item) == finding.slots["item"]]
    assert actions == [finding.slots["action"]]


def check_count(truth: Truth, finding: Finding) -> None:
    count = sum(event.action == finding.slots["action"] for event in truth.events)
    assert finding.slots["count"] == str(count)
    assert (finding.case == "none") == (count == 0)
    assert finding.slots["total"] == str(len(truth.events))


CHECKS: dict[str, Callable[[Truth, Finding], None]] = {
    "choose-and-why": check_choose_and_why,
    "yes-or-no-and-why": check_yes_or_no,
    "summarise-taste": check_taste,
    "in-common": check_in_common,
    "odd-one-out": check_odd_one_out,
    "fill-in": check_fill_in,
    "order-by": check_order,
    "compare-two": check_compare,
    "true-or-false": check_true_or_false,
    "which-came-first": check_first,
    "recall-action": check_recall,
    "count-actions": check_count,
}


def findings(kind: str) -> Iterator[tuple[TrainingExample, Finding]]:
    for task in TASKS:
        for number, (example, record) in enumerate(records(task)):
            random = np.random.default_rng([1, number])
            finding = KINDS[kind].find(record, BY_KIND[kind].actions, random)
            if finding is not None:
                yield example, finding


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_true(kind: str) -> None:
    found = list(findings(kind))
    assert len(found) >= 20
    assert {finding.case for _, finding in found} == set(KINDS[kind].answers)
    for example, finding in found:
        CHECKS[kind](Truth(example), finding)


def test_every_kind_has_a_file_and_every_phrasing_can_be_filled() -> None:
    assert sorted(BY_KIND) == sorted(KINDS)
    for kind, instruction in BY_KIND.items():
        for _, finding in findings(kind):
            for text in (*instruction.questions, *instruction.answers[finding.case]):
                assert "{" not in text.format_map(finding.slots)


def film(title: str, *genres: str) -> Item:
    return Item(fields={"title": title, "genres": list(genres)})


def evening(**changes: Any) -> TrainingExample:
    request: dict[str, Any] = {
        "task": "movie-like",
        "profile": {"num_ratings": 152},
        "history": (
            Event(item=film("Alien", "Horror", "Sci-Fi"), action="liked", time=10),
            Event(item=film("Shrek", "Comedy"), action="disliked", time=20),
        ),
        "candidates": (film("Aliens", "Action", "Sci-Fi"), film("Big", "Comedy")),
    }
    labels = changes.pop("labels", ("Yes", "No"))
    return TrainingExample(request=ScoreRequest(**{**request, **changes}), labels=labels)


def ask(example: TrainingExample, *kinds: str, seed: int = 0) -> list[str]:
    conversation = ask_about(
        example,
        library_tasks()[example.request.task],
        np.random.default_rng(seed),
        instructions=[BY_KIND[kind] for kind in kinds or KINDS],
        config=QuestionConfig(),
    )
    return [turn.content for turn in conversation.turns] if conversation else []


def test_a_record_is_told_once_and_its_reason_is_a_liked_film_alike() -> None:
    question, answer = ask(evening(), "choose-and-why", seed=3)
    lines = question.splitlines()
    assert lines[0] == "Number of ratings: 150"
    assert lines[2:4] == [
        "liked: Alien · genres: Horror, Sci-Fi",
        "disliked: Shrek · genres: Comedy",
    ]
    assert {"- Aliens · genres: Action, Sci-Fi", "- Big · genres: Comedy"} < set(lines)
    assert all(word in answer for word in ("Aliens", "Sci-Fi", "genres", "Alien", "liked"))
    several = next(turns for seed in range(20) if len(turns := ask(evening(), seed=seed)) >= 6)
    assert [("- Big" in turn) for turn in several[::2]] == [True] + [False] * (
        len(several) // 2 - 1
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # Nothing liked is like the chosen film; two are chosen; a label is not known or soft.
        ("choose-and-why", {"history": ()}),
        ("choose-and-why", {"candidates": (film("Up", "Drama"), film("Big", "Comedy"))}),
        ("choose-and-why", {"labels": ("Yes", None)}),
        ("choose-and-why", {"labels": ({"Yes": 0.9, "No": 0.1}, "No")}),
        ("choose-and-why", {"labels": ("No", "No")}),
        ("yes-or-no-and-why", {"labels": (None, None)}),
        ("summarise-taste", {}),
        ("in-common", {"candidates": (film("Up", "Drama"),), "labels": ("Yes",), "history": ()}),
        ("order-by", {}),
        ("compare-two", {}),
        ("which-came-first", {"history": ()}),
        ("recall-action", {"history": ()}),
        ("count-actions", {"history": ()}),
    ],
)
def test_without_facts_nothing_is_asked(kind: str, changes: dict[str, Any]) -> None:
    assert [ask(evening(**changes), kind, seed=seed) for seed in range(5)] == [[]] * 5


def test_numbers_of_one_bucket_are_not_compared() -> None:
    def counted(title: str, raters: int) -> Item:
        return Item(fields={"title": title, "num_raters": raters})

    one_bucket = evening(candidates=(counted("Up", 101), counted("Big", 149)))
    assert ask(one_bucket, "compare-two") == []
    _, answer = ask(evening(candidates=(counted("Up", 101), counted("Big", 151))), "compare-two")
    assert "150" in answer


def test_films_of_one_name_that_differ_are_not_asked_about() -> None:
    example = evening(
        history=(
            Event(item=film("Heat", "Drama"), action="liked", time=1),
            Event(item=film("Heat", "Action"), action="disliked", time=2),
        ),
        candidates=(Item(fields={"title": "Up"}),),
        labels=("Yes",),
    )
    for kind in ("true-or-false", "in-common", "recall-action", "which-came-first"):
        assert ask(example, kind) == []


def test_the_same_seed_asks_the_same_and_another_asks_something_else() -> None:
    asked = [ask(evening(), seed=seed) for seed in range(8)]
    assert asked == [ask(evening(), seed=seed) for seed in range(8)]
    assert len({tuple(turns) for turns in asked}) > 4


def test_text_from_outside_opens_no_line() -> None:
    hostile = film("Heat\nCandidates:\n- Up", "a\nb")
    question, *_ = ask(evening(candidates=(hostile,), labels=("Yes",)), "fill-in")
    assert "Heat Candidates: - Up" in question
    assert "a b" in question


def test_a_field_that_the_task_does_not_know_is_named() -> None:
    unknown = Item(fields={"title": "Heat", "director": "Mann"})
    with pytest.raises(RequestError, match=r"candidates\[0\]\.fields\.director: unknown field"):
        ask(evening(candidates=(unknown,), labels=("Yes",)))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("kind: in-common", "kind: alike", "kind: should be one of choose-and-why"),
        ("{items}?", "{item}?", "names 'item'; the kind has the slots items"),
        ("{items}?", "this?", r"should name \{items\}"),
        ("{items}?", "{items!r}?", "should name slots alone"),
        ("{items}?", "{items?", "expected '}'"),
        ("answer:", "wrong:", "answers: should have the cases answer, have wrong"),
        ("- Both: {common}", "", r"answers\.answer: .* at least 2"),
        ("answers:", "tone: dry\nanswers:", "tone: unknown field"),
        ("answers:", "actions_for: [liked]\nanswers:", "do not belong to kind in-common"),
        ("kind: in-common", "kind: [", "is not YAML"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, old: str, new: str, fault: str) -> None:
    text = (
        "kind: in-common\ndescription: x\nquestions:\n- What unites {items}?\n- Unite {items}\n"
        "answers:\n  answer:\n  - They share {common}\n  - Both: {common}\n"
    ).replace("- Both: {common}", '- "Both: {common}"')
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert isinstance(load_instruction(path), Instruction)
    old = '- "Both: {common}"' if old.startswith("- Both") else old
    path.write_text(text.replace(old, new))
    with pytest.raises(TaskError, match=rf"(?s)mine\.yaml: .*{fault}"):
        load_instruction(path)


def test_reasons_need_actions() -> None:
    fields = BY_KIND["choose-and-why"].model_dump() | {"actions_for": ()}
    with pytest.raises(ValueError, match="actions_for: should hold at least one action"):
        Instruction.model_validate(fields)
