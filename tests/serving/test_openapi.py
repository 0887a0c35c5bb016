"""The page of the interface: every example on it is a question that the server answers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rankonce.ranker import Ranker
from rankonce.serving.batches.config import BatchConfig
from tests.conftest import build_network, build_tokenizer
from tests.model.test_adapters import build_adapter
from tests.serving.conftest import serving


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with everything allowed, whose folder holds what the examples name."""
    folder = tmp_path_factory.mktemp("interface")
    build_network("llama").save_pretrained(folder / "base")
    build_tokenizer(chat=True).save_pretrained(folder / "base")
    (folder / "runs").mkdir()
    build_adapter(folder / "base", folder / "runs" / "films", seed=1)
    ranker = Ranker.from_pretrained(folder / "base", device="cpu")
    batches = BatchConfig(data_dir=folder / "data")
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(ranker, allow_adapter_loading=True, batches=batches) as client,
    ):
        patch.chdir(folder)
        yield client


def examples_of(interface: dict[str, Any], operation: dict[str, Any]) -> list[Any]:
    """Find the examples of a question's body, where it is JSON."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return []
    schema = content["schema"]
    if "$ref" in schema:
        schema = interface["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return list(schema.get("examples", []))


def upload(http: httpx.Client) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    content = json.dumps({**line, "body": {"prompt": "M", "max_tokens": 1}})
    files = {"file": ("lines.jsonl", content.encode())}
    answer = http.post("/v1/files", data={"purpose": "batch"}, files=files)
    return str(answer.json()["id"])


def test_every_example_is_answered_in_the_form_that_the_page_shows(http: httpx.Client) -> None:
    interface = http.get("/openapi.json").json()
    answered: dict[str, int] = {}
    for path, methods in interface["paths"].items():
        if "post" not in methods:
            continue
        operation = methods["post"]
        assert operation["summary"]
        assert operation["description"]
        assert {"200", "400"} <= set(operation["responses"])
        for example in examples_of(interface, operation):
            if "input_file_id" in example:  # whose id nobody knows before
                example = {**example, "input_file_id": upload(http)}
            response = http.post(path, json=example)
            assert response.status_code == 200, f"{path} {example}: {response.text}"
            (kind,) = operation["responses"]["200"]["content"]
            assert response.headers["content-type"].startswith(kind)
            answered[path] = answered.get(path, 0) + 1
    # An endpoint without an example would otherwise pass.
    assert answered == {
        "/v1/rank": 1,
        "/v1/prefixes": 1,
        "/v1/score": 1,
        "/generative_scoring": 1,
        "/v1/rerank": 6,
        "/rerank": 6,
        "/v2/rerank": 6,
        "/v1/completions": 1,
        "/v1/chat/completions": 1,
        "/v1/batches": 1,
        "/v1/load_lora_adapter": 1,
        "/v1/unload_lora_adapter": 1,
    }


def test_the_page_itself_is_there(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert http.get("/openapi.json").json()["openapi"].startswith("3.1")
