"""Other wordings of a task: the same facts and labels, held in ``golden_styles/<task>.txt``.

``REGENERATE_GOLDENS=1 pytest tests/prompts/test_styles.py`` writes the files anew; read the diff.
"""

import copy
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rankonce.cli.tasks import example_request
from rankonce.errors import TaskError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.spelling import spell
from rankonce.prompts.tasks import Task, field_names, library_tasks, load_task
from rankonce.records import read_request
from tests.conftest import build_tokenizer
from tests.prompts.test_golden import letter_tokenizer
from tests.prompts.test_tasks import GOOD, write

GOLDEN = Path(__file__).parent / "golden_styles"
STYLED = sorted(name for name, task in library_tasks().items() if task.styles)
STYLE: dict[str, Any] = {
    "instruction": "Predict skips.",
    "profile": {"lines": ["Lives in {country}"]},
    "history": {"lines": ["{title} was {action} {age}"], "heading": "Heard:", "empty": "Nothing."},
    "candidate": {"lines": ["{title} is the song"], "separator": "; "},
    "question": "Does the listener skip it, Yes or No?",
    "answer_slot": "Skips:",
}


def build_renderer(tokenizer: Any) -> Renderer:
    return Renderer(TextEncoder(tokenizer, chat=False), max_prompt_tokens=4096)


def write_prompt(task: Task, data: dict[str, Any], renderer: Renderer) -> str:
    rendered = renderer.render(task, read_request(data))
    return rendered.prefix + "\n---\n".join(rendered.segments)


@pytest.mark.parametrize("name", STYLED)
def test_every_style_equals_its_golden_file(name: str) -> None:
    task, path = library_tasks()[name], GOLDEN / f"{name}.txt"
    renderer, data = build_renderer(letter_tokenizer(task)), example_request(task)
    parts = [
        f"── {style} ──\n{write_prompt(task.in_style(style), data, renderer)}\n"
        for style in task.styles
    ]
    if os.environ.get("REGENERATE_GOLDENS"):
        path.write_text("".join(parts), encoding="utf-8")
    assert "".join(parts) == path.read_text(encoding="utf-8")


def test_every_task_of_the_library_has_a_second_wording_and_its_golden_file() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(STYLED) == set(library_tasks())


def choose_fields(task: Task) -> set[frozenset[str]]:
    """Choose which optional fields a candidate has, for the wordings to be compared.

    A line is written when all of its fields are there. Two wordings that differ on any of the
    subsets therefore differ on the fields of one of their lines alone. Around these stand all
    subsets in which up to two fields are missing, or are there.
    """
    optional = frozenset(key for key, spec in task.candidate.fields.items() if not spec.required)
    lines = [line for wording in task.wordings() for line in wording.candidate.lines]
    there = {optional & set(field_names(line)) for line in lines}
    for size in range(min(2, len(optional)) + 1):
        for some in map(frozenset, combinations(sorted(optional), size)):
            there |= {some, optional - some}
    return there


@pytest.mark.parametrize("name", STYLED)
def test_every_two_fields_are_there_and_missing_together_and_apart(name: str) -> None:
    chosen = choose_fields(library_tasks()[name])
    for one, other in combinations(sorted(frozenset().union(*chosen)), 2):
        assert len({(one in there, other in there) for there in chosen}) == 4, (one, other)


@pytest.mark.parametrize("name", STYLED)
def test_wordings_write_the_same_facts_whatever_is_missing(name: str) -> None:
    task, renderer = library_tasks()[name], build_renderer(build_tokenizer())
    whole = example_request(task)["candidates"][0]["fields"]
    assert set(whole) == set(task.candidate.fields)
    for there in choose_fields(task):
        fields = {
            key: value
            for key, value in whole.items()
            if key in there or task.candidate.fields[key].required
        }
        data = {**example_request(task), "candidates": [{"fields": fields}]}
        words = {key: spell(v, task.candidate.fields[key], path="") for key, v in fields.items()}
        facts = []
        for wording in task.wordings():
            segment = renderer.render(wording, read_request(data)).segments[0]
            segment = segment.replace(wording.question, "")
            facts.append({key for key, word in words.items() if word in segment})
        assert all(one == facts[0] for one in facts), sorted(there)


def test_a_style_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    data = {**GOOD, "styles": {"brief": {"question": "Skip: Yes or No?"}, "other": STYLE}}
    task = load_task(write(tmp_path, data))
    own, short, other = task.wordings()  # the file holds them in the order of their names
    assert own is task
    expected = load_task(write(tmp_path, {**GOOD, "question": "Skip: Yes or No?"}))
    assert short.model_dump() == expected.model_dump()
    assert other.instruction == "Predict skips."
    assert other.candidate.lines == ("{title} is the song",)
    assert other.candidate.fields == task.candidate.fields
    assert other.history is not None
    assert (other.history.heading, other.history.policy) == ("Heard:", "chronological")
    assert (other.labels, other.ranking, other.name) == (task.labels, task.ranking, task.name)


FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("profile.lines: leave out country", lambda s: s["profile"].update(lines=["Somebody"])),
    ("history.lines: leave out age", lambda s: s["history"].update(lines=["{action}: {title}"])),
    (
        "candidate.lines: add year where the optional fields are year",
        lambda s: s["candidate"]["lines"].append("{year}"),
    ),
    (
        "candidate: line '{artist}' names 'artist', which is not under fields",
        lambda s: s["candidate"]["lines"].append("{artist}"),
    ),
    (
        "candidate.lines: ' {title}' should begin",
        lambda s: s["candidate"].update(lines=[" {title}"]),
    ),
    ("question: should name the label 'No'", lambda s: s.update(question="Skipped? Yes or else")),
    ("labels: unknown field", lambda s: s.update(labels=[])),
]


@pytest.mark.parametrize(("fault", "change"), FAULTS)
def test_a_style_with_other_facts_or_labels_is_refused(
    tmp_path: Path, fault: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    data, style = copy.deepcopy(GOOD), copy.deepcopy(STYLE)
    data["candidate"]["fields"]["year"] = {}
    change(style)
    with pytest.raises(TaskError) as caught:
        load_task(write(tmp_path, {**data, "styles": {"short": style}}))
    assert "styles.short." in str(caught.value)
    assert fault in str(caught.value)


def test_a_line_that_needs_more_fields_than_the_own_line_leaves_facts_out(tmp_path: Path) -> None:
    data = copy.deepcopy(GOOD)
    data["candidate"]["fields"].update(year={}, artist={})
    data["candidate"]["lines"] += ["{year}", "by {artist}"]
    data["styles"] = {"joined": {"candidate": {"lines": ["{title}", "{year} by {artist}"]}}}
    with pytest.raises(TaskError, match="leave out year where the optional fields are year"):
        load_task(write(tmp_path, data))


def test_a_style_for_a_history_that_the_task_lacks_is_refused(tmp_path: Path) -> None:
    data = {**GOOD, "styles": {"short": {"history": {"lines": ["{title}"]}}}}
    del data["history"]
    with pytest.raises(TaskError, match=r"styles\.short\.history: the task has none"):
        load_task(write(tmp_path, data))


def test_an_unknown_style_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(TaskError, match="style: should be one of brief, sentences, is 'terse'"):
        library_tasks()["job-apply"].in_style("terse")
