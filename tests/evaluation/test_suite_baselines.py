"""Trees over the fields of requests: they find what was planted, and learn from the past alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rankonce.evaluation.suite_baselines import trees
from rankonce.evaluation.suite_data import SuiteRequest
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.records import Event, Item, ScoreRequest, TrainingExample

NUM_EARLIER = 300
WORDS = ("red", "green", "blue", "black")
# What a label is drawn from, each found in a column of its own kind.
PLANTED = ("number", "category", "list", "profile", "events", "words", "history")


def share_of(planted: str, request: ScoreRequest, item: Item) -> float:
    """P(the first label) by one thing of the request."""
    fields, history = item.fields, [event.item.fields["title"] for event in request.history]
    found = {
        "number": fields["num_raters"] > 50,
        "category": fields["kind"] in ("a", "c"),
        "list": "War" in fields["genres"],
        "profile": request.profile["num_ratings"] > 50,
        "events": len(request.history) > 2,
        "words": fields["title"] == request.profile["wish"],
        "history": fields["title"] in history,
    }
    return 0.9 if found[planted] else 0.1


def make_requests(task: Task, planted: str, number: int, *, seed: int = 0) -> list[SuiteRequest]:
    random = np.random.default_rng(seed)
    first, *others = task.label_names
    made = []
    for _ in range(number):
        request = ScoreRequest(
            task=task.name,
            profile={"num_ratings": int(random.integers(100)), "wish": random.choice(WORDS).item()},
            history=tuple(
                Event(
                    item=Item(fields={"title": random.choice(WORDS).item()}),
                    action="liked",
                    time=0.0,
                )
                for _ in range(random.integers(6))
            ),
            candidates=tuple(
                Item(
                    fields={
                        "title": random.choice(WORDS).item(),
                        "kind": random.choice(list("abcd")).item(),
                        "genres": random.choice(["War", "Drama", "Comedy"], 2).tolist(),
                        "num_raters": int(random.integers(100)),
                    }
                )
                for _ in range(5)
            ),
        )
        labels = tuple(
            first
            if random.uniform() < share_of(planted, request, item)
            else others[random.integers(len(others))]
            for item in request.candidates
        )
        example = TrainingExample(request=request, labels=labels)
        made.append(SuiteRequest(example=example, member="one"))
    return made


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", ["movie-like", "product-rating"])
def test_trees_find_what_was_planted(name: str, planted: str) -> None:
    task = library_tasks()[name]
    later = make_requests(task, planted, 40, seed=1)
    guesses = trees(task, make_requests(task, planted, NUM_EARLIER), later)
    assert guesses is not None
    truths, guessed = [], []
    for one, request in zip(later, guesses, strict=True):
        for item, guess in zip(one.example.request.candidates, request, strict=True):
            assert set(guess) == set(task.label_names)
            assert sum(guess.values()) == pytest.approx(1)
            truths.append(share_of(planted, one.example.request, item))
            guessed.append(guess[task.label_names[0]])
    assert np.abs(np.array(guessed) - truths).mean() < 0.1


def relabel(requests: Sequence[SuiteRequest]) -> list[SuiteRequest]:
    return [
        replace(one, example=replace(one.example, labels=one.example.labels[::-1]))
        for one in requests
    ]


def test_trees_read_no_label_of_what_they_guess() -> None:
    task = library_tasks()["movie-like"]
    earlier, later = (make_requests(task, "number", n, seed=n) for n in (NUM_EARLIER, 20))
    guessed = trees(task, earlier, later)
    assert trees(task, earlier, relabel(later)) == guessed
    assert trees(task, relabel(earlier), later) != guessed


def test_what_was_never_seen_is_guessed_as_missing() -> None:
    task = library_tasks()["movie-like"]
    earlier, (one,) = make_requests(task, "category", NUM_EARLIER), make_requests(task, "list", 1)
    known = {**one.example.request.candidates[0].fields, "genres": ["red"], "title": "red"}
    # A kind of the title's word adds no word; other than that, none of these was there before.
    strange = [{**known, "kind": "red", "new": 7}, {**known, "kind": 5}, {**known, "kind": None}]
    request = replace(
        one.example.request, candidates=tuple(Item(fields=fields) for fields in strange)
    )
    asked = replace(one, example=TrainingExample(request=request, labels=("Yes", "No", "Yes")))
    ((first, *others),) = trees(task, earlier, [asked]) or [[{}]]
    assert first
    assert others == [first, first]


@pytest.mark.parametrize("fault", ["few", "one label", "one label of late", "none"])
def test_too_little_to_learn_from_grows_no_trees(fault: str) -> None:
    task = library_tasks()["movie-like"]
    earlier = make_requests(task, "number", NUM_EARLIER)
    first = [replace(one, example=replace(one.example, labels=("Yes",) * 5)) for one in earlier]
    given = {
        "few": earlier[:39],
        "one label": first,
        "one label of late": [*earlier[:200], *first[200:]],
        "none": [],
    }
    assert trees(task, given[fault], earlier[:2]) is None
    assert trees(task, earlier[:40], earlier[:2]) is not None
