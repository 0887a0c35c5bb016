"""Task files: what the library holds, and how faults are told."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankonce.cli.tasks import example_request
from rankonce.errors import TaskError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import field_names, find_task, library_tasks, load_task
from rankonce.records import read_request
from tests.conftest import build_tokenizer

GOOD: dict[str, Any] = {
    "name": "song-skip",
    "description": "Will the listener skip this song?",
    "instruction": "You predict what a listener skips.",
    "profile": {"fields": {"country": {}}, "lines": ["Country: {country}"]},
    "history": {"fields": {"title": {}}, "lines": ["{action} {age}: {title}"]},
    "candidate": {"fields": {"title": {"required": True}}, "lines": ["Song: {title}"]},
    "question": "Will the listener skip the song that follows? Answer Yes or No.",
    "labels": [{"name": "Yes"}, {"name": "No"}],
    "ranking": {"kind": "log_odds", "label": "No"},
}


def write(folder: Path, data: Any) -> Path:
    path = folder / "song-skip.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    change(data)
    return data


def test_a_task_file_is_read(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert (task.name, task.version, task.question_in) == ("song-skip", 1, "prefix")
    assert task.label_names == ("Yes", "No")
    assert task.history is not None
    assert task.history.max_tokens == 4096


FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("name: Field required", lambda d: d.pop("name")),
    ("name: String should match", lambda d: d.update(name="Song Skip")),
    ("version: Input should be greater than 0", lambda d: d.update(version=0)),
    ("description: Field required", lambda d: d.pop("description")),
    ("instruction: String should have at least 1", lambda d: d.update(instruction="")),
    ("question: Field required", lambda d: d.pop("question")),
    ("question_in: Input should be 'prefix' or 'segment'", lambda d: d.update(question_in="end")),
    ("answer_slot: String should have at least 1", lambda d: d.update(answer_slot="")),
    ("tone: unknown field", lambda d: d.update(tone="kind")),
    ("labels: Tuple should have at least 2", lambda d: d["labels"].pop()),
    ("labels: every name should stand once", lambda d: d["labels"].append({"name": "No"})),
    # YAML reads a bare Yes as a boolean.
    ("labels[0].name: Input should be a valid string", lambda d: d["labels"][0].update(name=True)),
    ("labels[1].weight: unknown field", lambda d: d["labels"][1].update(weight=2)),
    ("ranking.kind: Input should be 'log_odds' or", lambda d: d["ranking"].update(kind="best")),
    ("ranking.label: should be one of Yes, No", lambda d: d["ranking"].update(label="Maybe")),
    ("ranking.label: should be one of Yes, No", lambda d: d["ranking"].pop("label")),
    (
        "labels: expected_grade needs a grade",
        lambda d: d.update(ranking={"kind": "expected_grade"}),
    ),
    ("candidate: Field required", lambda d: d.pop("candidate")),
    ("candidate.lines: should hold at least one line", lambda d: d["candidate"].update(lines=[])),
    *[
        (
            f"candidate.lines: {line!r} should begin",
            lambda d, line=line: d["candidate"].update(lines=["Song: {title}", line]),
        )
        for line in ("", " {title}", "\n{title}", "\u2003{title}")
    ],
    (
        "candidate.fields.title: words should not be empty or begin with white space",
        lambda d: d["candidate"]["fields"]["title"].update(
            type="number", buckets=[1], words=["a", " "]
        ),
    ),
    (
        "candidate: line '{year}' names 'year', which is not under fields",
        lambda d: d["candidate"]["lines"].append("{year}"),
    ),
    ("candidate: line 'a {': Single '{'", lambda d: d["candidate"]["lines"].append("a {")),
    ("candidate: line '{}' ", lambda d: d["candidate"]["lines"].append("{}")),
    (
        "candidate: line '{title:d}': should name the field alone",
        lambda d: d["candidate"]["lines"].append("{title:d}"),
    ),
    ("line '{t!z}': should name the field alone", lambda d: d["profile"].update(lines=["{t!z}"])),
    (
        "candidate: line '{title:{w}}': should",
        lambda d: d["candidate"]["lines"].append("{title:{w}}"),
    ),
    (
        "candidate: fields.title.impute_from names no field: 'name'",
        lambda d: d["candidate"]["fields"]["title"].update(impute_from="name"),
    ),
    (
        "candidate.fields.title.type: Input should be 'text'",
        lambda d: d["candidate"]["fields"]["title"].update(type="str"),
    ),
    (
        "candidate.fields.title: words belong to type number",
        lambda d: d["candidate"]["fields"]["title"].update(words=["a"]),
    ),
    ("profile.lines", lambda d: d["profile"].update(lines="Country: {country}")),
    (
        "profile: line '{action}' names 'action'",
        lambda d: d["profile"]["lines"].append("{action}"),
    ),
    ("history.policy: Input should be", lambda d: d["history"].update(policy="newest")),
    ("history: policy recent needs max_events", lambda d: d["history"].update(policy="recent")),
    ("history.max_events: Input should be greater", lambda d: d["history"].update(max_events=0)),
    ("history.max_tokens: Input should be greater", lambda d: d["history"].update(max_tokens=-5)),
    ("history.actions", lambda d: d["history"].update(actions="liked")),
]


@pytest.mark.parametrize(("fault", "change"), FAULTS)
def test_a_fault_is_told_with_file_and_field(
    tmp_path: Path, fault: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = write(tmp_path, changed(change))
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: [", "is not YAML"),
        ("", "should be a valid dictionary"),
        ("- a\n- b\n", "should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TaskError, match=fault) as caught:
        load_task(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"missing\.yaml: cannot be read: No such file"):
        load_task(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TaskError, match=r"bytes\.yaml: is not YAML"):
        load_task(tmp_path / "bytes.yaml")


def test_an_unknown_task_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(TaskError, match="no task is called 'song-skip'; there are job-apply,"):
        find_task("song-skip", library_tasks())


@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_a_library_file_is_named_after_its_task(name: str) -> None:
    path = Path(__file__).parents[2] / "rankonce" / "prompts" / "library" / f"{name}.yaml"
    assert load_task(path).name == name


@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_a_library_task_names_each_of_its_fields_in_a_line(name: str) -> None:
    task = library_tasks()[name]
    for part in (task.profile, task.history, task.candidate):
        if part is not None:
            assert set(part.fields) <= {n for line in part.lines for n in field_names(line)}


@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_a_line_with_a_missing_optional_field_is_left_out(name: str) -> None:
    task = library_tasks()[name]
    data = example_request(task)
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    whole, bare = renderer.render(task, read_request(data)).segments
    assert len(bare) < len(whole) or all(spec.required for spec in task.candidate.fields.values())
    assert "{" not in whole + bare


def test_a_field_may_stand_in_for_a_missing_one() -> None:
    task = library_tasks()["similar-item"]
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    data = example_request(task)
    del data["profile"]["query"]
    assert "Query: source title of profile\n" in renderer.render(task, read_request(data)).prefix


def test_the_question_stands_where_the_task_wants_it(tmp_path: Path) -> None:
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    for place in ("prefix", "segment"):
        task = load_task(write(tmp_path, {**GOOD, "question_in": place}))
        rendered = renderer.render(task, read_request(example_request(task)))
        assert (task.question in rendered.prefix) == (place == "prefix")
        asked = f"Song: title of candidate b\n{task.question}\nAnswer:"
        assert (rendered.segments[1] == asked) == (place == "segment")


def test_log_odds_weigh_the_label_against_all_others() -> None:
    task = library_tasks()["job-apply"]
    log_probs = {"apply": math.log(0.5), "view": math.log(0.3), "dismiss": math.log(0.2)}
    assert task.ranking_value(log_probs) == pytest.approx(0.0, abs=1e-12)
    certain = {"apply": -1e-9, "view": -800.0, "dismiss": -900.0}
    assert task.ranking_value(certain) == pytest.approx(800.0)


def test_expected_grade_is_the_mean_of_the_grades() -> None:
    task = library_tasks()["movie-rating"]
    log_probs = {name: math.log(0.2) for name in task.label_names}
    assert task.ranking_value(log_probs) == pytest.approx(3.0)
