"""Adapters over HTTP: ``model`` names one, answers say which scored."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankonce.errors import ModelError
from rankonce.ranker import Ranker
from rankonce.serving.app import create_app
from rankonce.serving.engine import ServerConfig
from tests.conftest import build_request
from tests.model.test_adapters import build_base, build_both
from tests.serving.conftest import serving

PROMPTS = {"prompt": ["Heat\nAnswer:", "Up\nAnswer:"], "max_tokens": 1, "logprobs": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = build_base(tmp_path_factory.mktemp("served") / "tiny")
    return {"base": base, **build_both(base)}


def load(folders: dict[str, Path]) -> Ranker:
    adapters = {name: folders[name] for name in ("films", "jobs")}
    return Ranker.from_pretrained(folders["base"], device="cpu", adapters=adapters)


@pytest.fixture(scope="module")
def ranker(folders: dict[str, Path]) -> Ranker:
    return load(folders)


@pytest.fixture(scope="module")
def http(folders: dict[str, Path]) -> Iterator[httpx.Client]:
    with serving(load(folders)) as client:
        yield client


def rank(http: httpx.Client, **fields: Any) -> Any:
    body = {key: value for key, value in asdict(build_request(5)).items() if value is not None}
    return http.post("/v1/rank", json={**body, **fields}).json()


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, "films"),
        ({"model": "tiny"}, "films"),
        ({"model": "jobs"}, "jobs"),
        ({"adapter": "jobs"}, "jobs"),
        ({"model": "tiny", "adapter": ""}, None),
    ],
)
def test_model_or_adapter_or_the_task_chooses(
    http: httpx.Client, ranker: Ranker, fields: dict[str, str], adapter: str | None
) -> None:
    answer = rank(http, **fields)
    assert (answer["adapter"], answer["model"]) == (adapter, adapter or "tiny")
    expected = ranker.score(replace(build_request(5), adapter=adapter or ""))
    values = [result["value"] for result in answer["results"]]
    assert values == pytest.approx([one.value for one in expected.candidates], abs=1e-5)


def test_questions_for_many_adapters_at_once_are_answered_as_each_alone(
    http: httpx.Client,
) -> None:
    models = ["films", "jobs", "tiny", "jobs", "films"] * 3
    alone = {model: http.post("/v1/completions", json={**PROMPTS, "model": model}).json()
             for model in set(models)}  # fmt: skip
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(
            pool.map(
                lambda model: http.post("/v1/completions", json={**PROMPTS, "model": model}).json(),
                models,
            )
        )
    for model, answer in zip(models, together, strict=True):
        assert answer["model"] == model
        for choice, expected in zip(answer["choices"], alone[model]["choices"], strict=True):
            found, wanted = (one["logprobs"]["token_logprobs"][0] for one in (choice, expected))
            assert found == pytest.approx(wanted, abs=1e-5)
    first = {model: alone[model]["choices"][0]["logprobs"]["token_logprobs"][0] for model in alone}
    assert len({round(value, 3) for value in first.values()}) == 3


def test_score_and_rerank_take_an_adapter_too(http: httpx.Client) -> None:
    score = {"query": "Heat", "items": ["\nA", "\nB"], "label_token_ids": [5, 6]}
    rerank = {"query": "Heat", "documents": ["Heat is a film.", "Up"]}
    for path, body in (("/v1/score", score), ("/v1/rerank", rerank)):
        base, jobs = (
            http.post(path, json={**body, "model": model}).json() for model in ("tiny", "jobs")
        )
        assert (base["model"], jobs["model"]) == ("tiny", "jobs")
        parts = [answer.get("scores", answer.get("results")) for answer in (base, jobs)]
        assert parts[0] != parts[1]


def test_models_are_listed_with_their_adapters(http: httpx.Client) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny", None),
        ("films", "tiny"),
        ("jobs", "tiny"),
    ]
    assert http.get("/v1/models/jobs").json()["parent"] == "tiny"


def test_what_is_not_there_is_refused_with_what_is(http: httpx.Client) -> None:
    error = rank(http, model="songs")["error"]
    assert error["message"] == (
        "model: there is no 'songs', this server has 'tiny', 'films', 'jobs'"
    )
    assert rank(http, adapter="songs")["error"]["param"] == "adapter"
    error = rank(http, model="films", adapter="jobs")["error"]
    assert error["message"].startswith("adapter: should be left out or 'films'")


def test_an_adapter_cannot_be_called_what_the_model_is_called(ranker: Ranker) -> None:
    with pytest.raises(ModelError, match="adapter: 'films' is what the model is served as"):
        create_app(ranker, ServerConfig(served_model_name="films"))
