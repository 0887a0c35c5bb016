"""Several models and adapters behind one server; adapters come and go while questions run."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import typer

from rankonce.calibration import fingerprint_weights
from rankonce.cli.serve import _read_models
from rankonce.errors import ModelError
from rankonce.ranker import Ranker
from rankonce.serving.app import create_app
from rankonce.serving.operations import OperationsConfig
from tests.conftest import build_request
from tests.model.test_adapters import build_adapter, build_base
from tests.serving.conftest import serving


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = build_base(folder / "tiny")
    return {
        "tiny": base,
        "other": build_base(folder / "other", "qwen3", seed=7),
        "films": build_adapter(base, folder / "films", seed=1, tasks=("movie-like",)),
        "jobs": build_adapter(base, folder / "jobs", seed=2, tasks=("job-apply",)),
    }


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> Ranker:
    """A ranker that was loaded with both adapters."""
    adapters = {name: folders[name] for name in ("films", "jobs")}
    return Ranker.from_pretrained(folders["tiny"], device="cpu", adapters=adapters)


@pytest.fixture
def http(folders: dict[str, Path]) -> Iterator[httpx.Client]:
    """A server whose model has no adapter yet."""
    ranker = Ranker.from_pretrained(folders["tiny"], device="cpu")
    with serving(ranker, allow_adapter_loading=True) as client:
        yield client


def rank(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {key: value for key, value in asdict(build_request(5)).items() if value is not None}
    return http.post("/v1/rank", json={**body, **fields})


def values(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return [one["value"] for one in response.json()["results"]]


def expected(ranker: Ranker, adapter: str) -> Any:
    result = ranker.score(replace(build_request(5), adapter=adapter))
    return pytest.approx([one.value for one in result.candidates], abs=1e-5)


def load(http: httpx.Client, name: str, folder: Path, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder), **fields}
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_the_field_model_chooses_among_several_models(folders: dict[str, Path]) -> None:
    def read() -> dict[str, Ranker]:
        return {
            name: Ranker.from_pretrained(folders[folder], device="cpu")
            for name, folder in (("small", "tiny"), ("org/other", "other"))
        }

    alone = {name: expected(ranker, "") for name, ranker in read().items()}
    with serving(read()) as http:
        names = ["small", "org/other", None] * 5
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda name: rank(http, model=name), names))
        for name, answer in zip(names, answers, strict=True):
            assert values(answer) == alone[name or "small"]
            assert answer.json()["model"] == (name or "small")
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("small", None),
            ("org/other", None),
        ]
        assert http.get("/v1/models/org/other").json()["id"] == "org/other"
        assert [card["fingerprint"] for card in cards] == [
            fingerprint_weights(folders[name]) for name in ("tiny", "other")
        ]
        message = error_of(rank(http, model="tiny"), 404)["message"]
        assert message == "model: there is no 'tiny', this server has 'small', 'org/other'"
    assert alone["small"] != [*map(float, alone["org/other"].expected)]


def test_two_models_cannot_share_a_name(folders: dict[str, Path], whole: Ranker) -> None:
    other = Ranker.from_pretrained(folders["other"], device="cpu")
    with pytest.raises(ModelError, match="'films' is served twice"):
        create_app({"base": whole, "films": other})


def test_an_adapter_loaded_at_run_time_scores_as_one_loaded_at_the_start(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker
) -> None:
    before = rank(http)
    assert before.json()["adapter"] is None
    assert values(before) == expected(whole, "")
    answer = load(http, "films", folders["films"])
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'films' added successfully.",
    )
    # The adapter learnt the task of the question.
    assert rank(http).json()["adapter"] == "films"
    assert load(http, "jobs", folders["jobs"]).status_code == 200
    for name in ("films", "jobs"):
        assert values(rank(http, model=name)) == expected(whole, name)
    assert values(rank(http, model="tiny", adapter="")) == expected(whole, "")
    cards = http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny", None),
        ("films", "tiny"),
        ("jobs", "tiny"),
    ]
    assert [card["fingerprint"] for card in cards[1:]] == [
        fingerprint_weights(folders[name]) for name in ("films", "jobs")
    ]


def test_an_adapter_that_was_unloaded_is_found_no_more(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker
) -> None:
    for name in ("films", "jobs"):
        load(http, name, folders[name])
    assert unload(http, "films").text == "Success: LoRA adapter 'films' removed successfully."
    error = error_of(rank(http, model="films"), 404)
    assert error["message"] == "model: there is no 'films', this server has 'tiny', 'jobs'"
    assert error_of(rank(http, adapter="films"), 400)["param"] == "adapter"
    assert rank(http).json()["adapter"] is None
    assert values(rank(http)) == expected(whole, "")
    assert values(rank(http, model="jobs")) == expected(whole, "jobs")
    assert unload(http, "jobs").status_code == 200
    assert values(rank(http)) == expected(whole, "")
    assert error_of(unload(http, "jobs"), 404)["param"] == "lora_name"


def test_nothing_cached_of_an_adapter_outlives_it(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker
) -> None:
    load(http, "one", folders["films"])
    assert values(rank(http, model="one")) == expected(whole, "films")
    error = error_of(load(http, "one", folders["jobs"]), 400)
    assert error["message"] == "lora_name: 'one' is served already"
    assert load(http, "one", folders["jobs"], load_inplace=True).status_code == 200
    again = rank(http, model="one")
    assert values(again) == expected(whole, "jobs")
    assert again.json()["usage"]["cached_tokens"] == 0


def test_a_prefix_prepared_for_an_adapter_goes_with_it(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker
) -> None:
    load(http, "films", folders["films"])
    body = {key: value for key, value in asdict(build_request(5)).items() if value is not None}
    candidates = body.pop("candidates")
    handles = {
        name: http.post("/v1/prefixes", json={**body, "adapter": name}).json()["id"]
        for name in ("films", "")
    }

    def ask(name: str) -> httpx.Response:
        question = {"prefix": handles[name], "candidates": candidates}
        return http.post("/v1/rank", json=question)

    for name in ("films", ""):
        assert values(ask(name)) == expected(whole, name)
        assert ask(name).json()["usage"]["cached_tokens"] > 0
    assert unload(http, "films").status_code == 200
    assert error_of(ask("films"), 404)["code"] == "prefix_not_found"
    assert values(ask("")) == expected(whole, "")
    # Another one of the same name does not bring it back.
    assert load(http, "films", folders["jobs"]).status_code == 200
    assert error_of(ask("films"), 404)["code"] == "prefix_not_found"


def test_no_result_that_is_kept_outlives_its_adapter(
    folders: dict[str, Path], whole: Ranker
) -> None:
    ranker = Ranker.from_pretrained(folders["tiny"], device="cpu")
    with serving(ranker, allow_adapter_loading=True, result_cache_pairs=100) as http:
        for folder in ("films", "jobs"):
            load(http, "one", folders[folder], load_inplace=True)
            for _ in range(2):
                assert values(rank(http, model="one")) == expected(whole, folder)


def test_every_model_is_warmed_up_and_counted(folders: dict[str, Path]) -> None:
    rankers = {
        name: Ranker.from_pretrained(folders[name], device="cpu") for name in ("tiny", "other")
    }
    with serving(rankers, OperationsConfig(), allow_adapter_loading=True) as http:
        # It waits until the first questions are answered.
        assert load(http, "films", folders["films"]).status_code == 200
        assert http.get("/ready").json() == {"status": "ready"}
        for name in ("films", "other"):
            assert rank(http, model=name).status_code == 200
        metrics = http.get("/metrics").text
    for name in rankers:
        assert f'rankonce_queue_open{{model="{name}"}} 0.0' in metrics
        (hits,) = re.findall(
            rf'^rankonce_cache_misses_total{{cache="prefix",model="{name}"}} (\S+)$',
            metrics,
            re.MULTILINE,
        )
        assert float(hits) > 1


def test_questions_under_way_get_their_answers_when_an_adapter_leaves(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker
) -> None:
    right = {name: expected(whole, name) for name in ("films", "")}
    gone = Event()

    def ask(_: int) -> list[int]:
        statuses = []
        while not gone.is_set() or not statuses:
            # By its name, or by the task, which the backbone answers when the adapter is gone.
            for answer in (rank(http, model="films"), rank(http)):
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    name = answer.json()["adapter"] or ""
                    assert values(answer) == right[name]
                else:
                    assert error_of(answer, 404)["code"] == "model_not_found"
        return statuses

    for _ in range(3):
        gone.clear()
        load(http, "films", folders["films"])
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, place) for place in range(4)]
            rank(http, model="films")
            answer = unload(http, "films")
            gone.set()
            statuses = [status for one in asking for status in one.result()]
        assert answer.status_code == 200
        assert 200 in statuses
        assert error_of(rank(http, model="films"), 404)["param"] == "model"


def test_an_adapter_that_does_not_fit_changes_nothing(
    http: httpx.Client, folders: dict[str, Path], whole: Ranker, tmp_path: Path
) -> None:
    foreign = build_adapter(folders["other"], tmp_path / "foreign", seed=3)
    error = error_of(load(http, "foreign", foreign), 400)
    assert error["param"] == "lora_path"
    assert "whose weights are not those of" in error["message"]
    for number, shape in enumerate(({"num_hidden_layers": 4}, {"intermediate_size": 64})):
        other = build_base(tmp_path / f"shape{number}", **shape)
        foreign = build_adapter(other, tmp_path / f"foreign{number}", seed=3)
        (foreign / "run.json").unlink()  # nothing says what it belongs to
        assert error_of(load(http, "foreign", foreign), 400)["param"] == "lora_path"
        assert values(rank(http)) == expected(whole, "")
    assert "adapter_config.json" in error_of(load(http, "x", tmp_path), 400)["message"]
    assert error_of(load(http, "x", Path("a" * 5000)), 400)["param"] == "lora_path"
    assert "letters, digits" in error_of(load(http, "a/b", folders["films"]), 400)["message"]
    assert error_of(load(http, "tiny", folders["films"]), 400)["param"] == "lora_name"
    assert error_of(load(http, "x", folders["films"], model="nope"), 404)["param"] == "model"
    assert values(rank(http)) == expected(whole, "")
    assert load(http, "films", folders["films"]).status_code == 200
    assert values(rank(http, model="films")) == expected(whole, "films")


def test_adapters_are_not_loaded_unless_the_operator_allows_it(
    folders: dict[str, Path], whole: Ranker
) -> None:
    with serving(whole) as http:
        for answer in (load(http, "more", folders["films"]), unload(http, "films")):
            error = error_of(answer, 403)
            assert error["code"] == "adapter_loading_not_allowed"
            assert "--allow-adapter-loading" in error["message"]
        assert rank(http, model="films").status_code == 200


def test_the_adapter_that_everything_goes_to_stays(folders: dict[str, Path]) -> None:
    ranker = Ranker.from_pretrained(folders["films"], device="cpu")
    with serving(ranker, allow_adapter_loading=True) as http:
        assert error_of(unload(http, "default"), 400)["param"] == "lora_name"


@pytest.mark.parametrize(
    ("texts", "models"),
    [
        (None, {"": None}),
        (["org/one"], {"": "org/one"}),
        (["small=org/one"], {"small": "org/one"}),
        (["small=org/one", "a/b=x=y"], {"small": "org/one", "a/b": "x=y"}),
    ],
)
def test_models_are_read_with_their_names(
    texts: list[str] | None, models: dict[str, str | None]
) -> None:
    assert _read_models(texts, served_model_name=None) == models


@pytest.mark.parametrize(
    ("texts", "name"), [(["a", "b"], None), (["x=a", "x=b"], None), (["x=a"], "y")]
)
def test_models_without_distinct_names_are_refused(texts: list[str], name: str | None) -> None:
    with pytest.raises(typer.BadParameter):
        _read_models(texts, served_model_name=name)
