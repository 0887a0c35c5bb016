"""The store: a score is asked for once, whoever reads it and however often a process is killed."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce.distillation.asking import add_scores, fill_store
from rankonce.distillation.store import Cost, ScoreStore, fingerprint_task, score_keys
from rankonce.distillation.teachers import LocalTeacher
from rankonce.errors import DataError
from rankonce.prompts.tasks import library_tasks
from rankonce.records import TrainingExample
from rankonce.training.data import read_examples
from tests.conftest import build_request

TASK = library_tasks()["movie-like"]


def test_a_key_is_what_a_score_depends_on() -> None:
    request = build_request(4)
    keys = score_keys("a", TASK, request)
    assert len(set(keys)) == 4
    turned = replace(request, id="other", candidates=request.candidates[::-1])
    assert score_keys("a", TASK, turned) == keys[::-1]
    renamed = replace(request, candidates=tuple(replace(c, id="x") for c in request.candidates))
    assert score_keys("a", TASK, renamed) == keys
    changed = [
        score_keys("b", TASK, request),
        score_keys("a", TASK.model_copy(update={"question": "Yes or No?"}), request),
        score_keys("a", TASK, replace(request, history=request.history[1:])),
        score_keys("a", TASK, replace(request, instruction="Say Yes or No.")),
    ]
    assert not any(set(keys) & set(other) for other in changed)


def test_a_field_called_id_is_no_name() -> None:
    request = build_request(2)
    first, second = (
        replace(c, fields={"title": "Heat", "id": n}) for n, c in enumerate(request.candidates)
    )
    keys = score_keys("a", TASK, replace(request, candidates=(first, second)))
    assert keys[0] != keys[1]


def test_candidates_are_part_of_a_history_that_is_chosen_by_them() -> None:
    history = TASK.history
    assert history is not None
    similar = TASK.model_copy(
        update={"history": history.model_copy(update={"policy": "similar", "max_events": 3})}
    )
    request = build_request(4)
    fewer = replace(request, candidates=request.candidates[:3])
    assert score_keys("a", TASK, request)[:3] == score_keys("a", TASK, fewer)
    assert not set(score_keys("a", similar, request)) & set(score_keys("a", similar, fewer))


def test_styles_and_descriptions_make_no_other_task() -> None:
    assert TASK.styles
    plain = TASK.model_copy(update={"styles": {}, "description": "other"})
    assert fingerprint_task(plain) == fingerprint_task(TASK)


def test_scores_come_back_with_every_bit(tmp_path: Path) -> None:
    with ScoreStore(tmp_path / "deep" / "scores.sqlite") as store:
        store.register("t", name="teacher")
        said = {"Yes": -0.1234567890123456789, "No": -2.155}
        store.write("t", TASK, {b"1": said}, Cost(1, 1, 30, 0.5))
        store.write("t", TASK, {b"2": said}, Cost(2, 1, 12, 0.25))
        assert store.read(TASK, [b"1", b"3"]) == [said, None]
        assert store.cost("t") == Cost(3, 2, 42, 0.75)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.sqlite"]


def test_files_that_are_no_store_of_this_version_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to look like one" * 40)
    with pytest.raises(DataError, match="cannot be used as a store"):
        ScoreStore(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE things (name TEXT)")
    connection.close()
    with pytest.raises(DataError, match="database of something else"):
        ScoreStore(tmp_path / "other")
    ScoreStore(tmp_path / "new").close()
    with sqlite3.connect(tmp_path / "new") as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(DataError, match="should have version 1, has 7"):
        ScoreStore(tmp_path / "new")


def test_a_server_that_serves_something_else_now_is_named(tmp_path: Path) -> None:
    with ScoreStore(tmp_path / "scores") as store:
        store.register("t", name="http://here", served="a, context 10")
        store.register("t", name="http://here", served="a, context 10")
        with pytest.raises(DataError, match=r"served a, context 10; it now serves b"):
            store.register("t", name="http://here", served="b")


def test_what_is_stored_is_what_the_teacher_says_and_is_asked_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = read_examples(folder / "examples.jsonl")
    teacher = LocalTeacher(folder / "teacher")
    with ScoreStore(tmp_path / "scores") as store:
        # Half of the candidates first: only the others are asked for then.
        halves = [
            TrainingExample(
                request=replace(one.request, candidates=one.request.candidates[::2]), labels=()
            )
            for one in examples
        ]
        first = fill_store(store, teacher, halves, library_tasks())
        assert (first.num_calls, first.num_candidates) == (24, 72)
        second = fill_store(store, teacher, examples, library_tasks())
        assert (second.num_calls, second.num_candidates) == (24, 72)
        taught = list(add_scores(store, teacher.fingerprint, examples, library_tasks()))
        for example in taught:
            whole = teacher.ranker.score(example.request)
            assert example.teacher is not None
            for said, candidate in zip(example.teacher, whole.candidates, strict=True):
                assert said == pytest.approx(candidate.log_probs, abs=1e-5)

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the teacher's weights were loaded")

        monkeypatch.setattr("rankonce.distillation.teachers.Ranker.from_pretrained", refuse)
        again = LocalTeacher(folder / "teacher")
        assert fill_store(store, again, examples, library_tasks()) == Cost()


_FILL = """
import sys, time
from pathlib import Path
from rankonce.distillation import asking
from rankonce.distillation.store import ScoreStore
from rankonce.distillation.teachers import LocalTeacher
from rankonce.prompts.tasks import library_tasks
from rankonce.training.data import read_examples

class Slow(LocalTeacher):
    def score(self, requests):
        for request in requests:
            yield from super().score([request])
            time.sleep(0.05)

asking._SECONDS_PER_WRITE = 0.0
folder, path = Path(sys.argv[1]), Path(sys.argv[2])
with ScoreStore(path) as store:
    examples = read_examples(folder / "examples.jsonl")
    asking.fill_store(store, Slow(folder / "teacher"), examples, library_tasks())
"""


def test_a_killed_process_leaves_what_it_had_and_only_the_rest_is_asked(
    folder: Path, tmp_path: Path
) -> None:
    root, path = Path(__file__).parents[2], tmp_path / "scores"
    process = subprocess.Popen(
        [sys.executable, "-c", _FILL, str(folder), str(path)],
        cwd=root,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(root),
        },
        stderr=subprocess.DEVNULL,
    )
    with ScoreStore(path) as store:
        deadline = time.monotonic() + 120
        while len(store) < 30 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_kept = len(store)
        assert 30 <= num_kept < 144
        examples = read_examples(folder / "examples.jsonl")
        cost = fill_store(store, LocalTeacher(folder / "teacher"), examples, library_tasks())
        assert cost.num_candidates == 144 - num_kept
        assert cost.num_calls == (144 - num_kept) / 6
