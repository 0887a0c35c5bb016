"""Teachers behind a server, teachers of another vocabulary, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rankonce.client import ClientConfig
from rankonce.distillation.asking import add_scores, fill_store
from rankonce.distillation.store import Cost, ScoreStore
from rankonce.distillation.teachers import LocalTeacher, ServedTeacher, find_teacher
from rankonce.errors import DataError, ModelError, ServerError, TrainingError
from rankonce.model.loading import prepare_model
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from tests.conftest import build_network, build_request, build_tokenizer
from tests.serving.conftest import serving

EXAMPLES = [
    TrainingExample(request=build_request(3 + seed % 4, seed=seed), labels=()) for seed in range(9)
]
TASKS = library_tasks()


def build_ranker(*, seed: int = 0, name: str = "tiny") -> Ranker:
    network = build_network("qwen3", seed=seed)
    return Ranker(prepare_model(network, build_tokenizer(), name=name))


def test_a_server_teaches_what_its_model_says_and_is_asked_once(tmp_path: Path) -> None:
    with serving(build_ranker()) as http, ScoreStore(tmp_path / "scores") as store:
        url = str(http.base_url)
        teacher = find_teacher(f"{url}/", concurrency=3)
        cost = fill_store(store, teacher, EXAMPLES, TASKS)
        assert (cost.num_calls, cost.num_candidates) == (9, 39)
        ranker = build_ranker()
        for example in add_scores(store, teacher.fingerprint, EXAMPLES, TASKS):
            assert example.teacher is not None
            expected = ranker.score(example.request)
            for said, one in zip(example.teacher, expected.candidates, strict=True):
                assert said == pytest.approx(one.log_probs, abs=1e-4)
        teacher.close()
    with ScoreStore(tmp_path / "scores") as store:
        # The server is gone; nobody needs it.
        assert fill_store(store, find_teacher(url), EXAMPLES, TASKS) == Cost()
        more = [TrainingExample(request=build_request(2, seed=77), labels=())]
        with pytest.raises(ServerError, match=url):
            fill_store(store, find_teacher(url), more, TASKS)


def test_a_server_with_other_weights_does_not_mix_into_a_store(tmp_path: Path) -> None:
    more = [*EXAMPLES, TrainingExample(request=build_request(2, seed=77), labels=())]
    with serving(build_ranker()) as http, ScoreStore(tmp_path / "scores") as store:
        teacher = ServedTeacher(ClientConfig(url=str(http.base_url)))
        fill_store(store, teacher, EXAMPLES, TASKS)
        fingerprint = teacher.fingerprint
        # One call asks again for what is known, one for what is new.
        assert fill_store(store, teacher, more, TASKS).num_calls == 2
        teacher.close()
    with serving(build_ranker(seed=5)) as http, ScoreStore(tmp_path / "scores") as store:

        class Moved(ServedTeacher):
            @property
            def fingerprint(self) -> str:
                return fingerprint

        other = Moved(ClientConfig(url=str(http.base_url)))
        newer = [*more, TrainingExample(request=build_request(2, seed=78), labels=())]
        with pytest.raises(DataError, match="holds other scores"):
            fill_store(store, other, newer, TASKS)
        other.close()


def test_weights_that_differ_a_little_behind_the_same_address_are_noticed(
    folder: Path, tmp_path: Path
) -> None:
    """Too little for a log-probability to tell: the server says which weights it holds."""
    old = folder / "teacher"
    new = tmp_path / "new"
    shutil.copytree(old, new)
    weights = {name: 1.001 * value for name, value in load_file(new / "model.safetensors").items()}
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})

    class Moved(ServedTeacher):
        fingerprint = "one address"

    served = {}
    with ScoreStore(tmp_path / "scores") as store:
        for model, count in ((old, 4), (old, 6), (new, 9)):
            ranker = Ranker.from_pretrained(model, device="cpu")
            with serving(ranker, served_model_name="teacher") as http:
                teacher = Moved(ClientConfig(url=str(http.base_url)))
                served[model] = ranker.score(EXAMPLES[0].request)
                if model == new:
                    with pytest.raises(
                        DataError, match=r"now serves teacher, .*, weights \w{16}: "
                    ):
                        fill_store(store, teacher, EXAMPLES[:count], TASKS)
                else:
                    fill_store(store, teacher, EXAMPLES[:count], TASKS)
                teacher.close()
    for before, after in zip(served[old].candidates, served[new].candidates, strict=True):
        assert before.log_probs == pytest.approx(after.log_probs, abs=0.2)


def test_a_request_that_a_server_refuses_is_named_by_its_place(tmp_path: Path) -> None:
    known = EXAMPLES[0]
    long = replace(known.request.candidates[0], fields={"title": "Alien " * 5000})
    request = replace(known.request, candidates=(*known.request.candidates, long))
    more = TrainingExample(request=request, labels=(), source="films.jsonl: line 7")
    place = len(known.request.candidates)
    with serving(build_ranker()) as http, ScoreStore(tmp_path / "scores") as store:
        teacher = ServedTeacher(ClientConfig(url=str(http.base_url)))
        fill_store(store, teacher, [known], TASKS)
        fault = rf"^films.jsonl: line 7: the teacher: .*candidates\[{place}\]: the prompt has"
        with pytest.raises(DataError, match=fault):
            fill_store(store, teacher, [more], TASKS)
        teacher.close()


def test_labels_that_differ_are_named_on_both_sides(tmp_path: Path) -> None:
    task = TASKS["movie-like"]
    data = task.model_dump()
    labels = [{"name": "True"}, {"name": "False"}]
    data |= {"labels": labels, "ranking": {"kind": "log_odds", "label": "True"}, "styles": {}}
    own = type(task).model_validate({**data, "question": "True or False?"})
    with serving(build_ranker()) as http, ScoreStore(tmp_path / "scores") as store:
        teacher = ServedTeacher(ClientConfig(url=str(http.base_url)))
        with pytest.raises(
            TrainingError,
            match=r"scores Yes, No in task 'movie-like', the student "
            r"learns True, False",
        ):
            fill_store(store, teacher, EXAMPLES, {**TASKS, "movie-like": own})
        assert len(store) == 0
        teacher.close()


def test_a_model_that_a_server_does_not_have_is_named(tmp_path: Path) -> None:
    with serving(build_ranker()) as http, ScoreStore(tmp_path / "scores") as store:
        teacher = ServedTeacher(ClientConfig(url=str(http.base_url), model="huge"))
        with pytest.raises(ServerError, match="serves tiny, not huge"):
            fill_store(store, teacher, EXAMPLES, TASKS)
        teacher.close()


def test_weights_tokenizer_and_precision_identify_a_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    first = LocalTeacher(folder / "teacher").fingerprint
    assert LocalTeacher(folder / "teacher" / ".." / "teacher").fingerprint == first
    assert LocalTeacher(folder / "teacher", precision="bf16").fingerprint != first
    assert LocalTeacher(folder / "teacher" / "start").fingerprint != first


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no checkpoint"):
        find_teacher(str(tmp_path)).fingerprint  # noqa: B018
    with pytest.raises(TrainingError, match="precision: is for a teacher that is loaded here"):
        find_teacher("http://127.0.0.1:1", precision="bf16")


def test_candidates_that_stand_twice_are_asked_once(folder: Path, tmp_path: Path) -> None:
    twice = [EXAMPLES[0], replace(EXAMPLES[0])]
    with ScoreStore(tmp_path / "scores") as store:
        cost = fill_store(store, LocalTeacher(folder / "teacher"), twice, TASKS)
    assert (cost.num_calls, cost.num_candidates) == (1, 3)
