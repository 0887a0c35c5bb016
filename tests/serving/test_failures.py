"""Whatever is wrong with a question, the answer says which field and never shows a traceback."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import Served, build_ranker, serving

RANK: dict[str, Any] = {"task": "movie-like", "candidates": [{"fields": {"title": "Heat"}}]}
RERANK: dict[str, Any] = {"query": "Heat", "documents": ["Heat is a film."]}
SCORE: dict[str, Any] = {"query": "Heat", "items": [" Answer:"], "label_token_ids": [5, 6]}
COMPLETION: dict[str, Any] = {"prompt": "Heat", "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "M"}], "max_tokens": 1}
VALID = {
    "/v1/rank": RANK,
    "/v1/rerank": RERANK,
    "/v1/score": SCORE,
    "/generative_scoring": SCORE,
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
}
LONG = "M " * 5000


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/rank", {"task": None}, "task", "valid string"),
    ("/v1/rank", {"task": "nope"}, "task", "no task is called 'nope'"),
    ("/v1/rank", {"candidates": []}, "candidates", "at least one candidate"),
    ("/v1/rank", {"candidates": [{"field": {}}]}, "candidates[0].fields", "required"),
    ("/v1/rank", {"candidates": [{"fields": {}}]}, "candidates[0].fields.title", "missing"),
    ("/v1/rank", {"candidates": [{"fields": {"x": 1}}]}, "candidates[0].fields.x", "unknown"),
    ("/v1/rank", {"profile": {"num_ratings": "many"}}, "profile.num_ratings", "number"),
    ("/v1/rank", {"top_n": 0}, "top_n", "greater than or equal to 1"),
    ("/v1/rank", {"top_k": 1}, "top_k", "unknown field"),
    ("/v1/rerank", {"query": None}, "query", "valid string"),
    ("/v1/rerank", {"query": " "}, "query", "empty"),
    ("/v1/rerank", {"documents": []}, "documents", "at least 1"),
    ("/v1/rerank", {"documents": ["a", 3]}, "documents[1]", "should be text or"),
    ("/v1/rerank", {"documents": ["a", ""]}, "documents[1].text", "empty"),
    ("/v1/rerank", {"documents": [{"url": "b"}]}, "documents[0].text", "required and missing"),
    ("/v1/rerank", {"texts": ["a"]}, "texts", "left out beside documents"),
    ("/v1/rerank", {"rank_fields": ["body"]}, "documents[0]", "one of the rank_fields"),
    ("/v1/rerank", {"instruction": " "}, "instruction", "should be text"),
    ("/v1/rerank", {"instruct": "x", "max_tokens_per_doc": 9}, "max_tokens_per_doc", "bare list"),
    ("/v1/rerank", {"relevant_spans": {}}, "relevant_spans", "cannot"),
    ("/v1/rerank", {"raw_scores": True}, "raw_scores", "between 0 and 1"),
    ("/v1/rank", {"instruction": ""}, "instruction", "should be text"),
    ("/generative_scoring", {"label_token_ids": None}, "label_token_ids", "required"),
    ("/generative_scoring", {"items": ["a", ""], "query": ""}, "items[1]", "at least one token"),
    ("/v1/rerank", {"task": "nope"}, "task", "no task is called"),
    ("/v1/rerank", {"task": "movie-like"}, "documents[0].text", "unknown field"),
    ("/v1/rerank", {"max_tokens_per_doc": 0}, "max_tokens_per_doc", "greater than or equal to 1"),
    ("/v1/score", {"query": 3}, "query", "text or a list of token ids"),
    ("/v1/score", {"items": []}, "items", "should be"),
    ("/v1/score", {"items": [[1, 2]]}, "items", "like query"),
    ("/v1/score", {"query": [1], "items": [1, 2]}, "items", "should be a list of"),
    ("/v1/score", {"query": "", "items": ["a", ""]}, "items[1]", "at least one token"),
    ("/v1/score", {"label_token_ids": None}, "label_token_ids", "required"),
    ("/v1/score", {"label_token_ids": []}, "label_token_ids", "at least 1"),
    ("/v1/score", {"label_token_ids": [5, 640]}, "label_token_ids", "640"),
    ("/v1/score", {"label_token_ids": [-1]}, "label_token_ids", "-1"),
    ("/v1/score", {"labels": [" Yes"]}, "request", "give one of the two"),
    ("/v1/completions", {"max_tokens": None}, "max_tokens", "should be 1"),
    ("/v1/completions", {"max_tokens": 16}, "max_tokens", "should be 1"),
    ("/v1/completions", {"max_tokens": 0, "echo": True}, "max_tokens", "should be 1"),
    ("/v1/completions", {"echo": True}, "echo", "not sent back"),
    ("/v1/completions", {"n": 2}, "n", "should be 1"),
    ("/v1/completions", {"best_of": 2}, "best_of", "should be 1"),
    ("/v1/completions", {"stream": True}, "stream", "should be false"),
    ("/v1/completions", {"suffix": "x"}, "suffix", "left out"),
    ("/v1/completions", {"logit_bias": {"5": 1}}, "logit_bias", "left out"),
    ("/v1/completions", {"stop": ["x"]}, "stop", "after one token"),
    ("/v1/completions", {"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ("/v1/completions", {"prompt": None}, "prompt", "should be text"),
    ("/v1/completions", {"prompt": []}, "prompt", "should be text"),
    ("/v1/completions", {"prompt": ["a", 1]}, "prompt", "should be text"),
    ("/v1/completions", {"prompt": [True]}, "prompt", "should be text"),
    ("/v1/completions", {"prompt": ""}, "prompt", "at least one token"),
    ("/v1/completions", {"prompt": [[1], [640]]}, "prompt[1]", "640"),
    ("/v1/completions", {"prompt": [[1], []]}, "prompt[1]", "at least one token"),
    ("/v1/completions", {"labels": ["Yes and No"]}, "labels", "should be one token"),
    ("/v1/completions", {"labels": [""]}, "labels", "should be one token"),
    ("/v1/completions", {"best": 1}, "best", "unknown field"),
    ("/v1/chat/completions", {"max_tokens": None}, "max_tokens", "should be 1"),
    ("/v1/chat/completions", {"max_tokens": 2}, "max_tokens", "should be 1"),
    ("/v1/chat/completions", {"max_completion_tokens": 9}, "max_completion_tokens", "should be 1"),
    ("/v1/chat/completions", {"messages": []}, "messages", "at least 1"),
    ("/v1/chat/completions", user(None), "messages[0].content", "should be text"),
    ("/v1/chat/completions", user([{"type": "image_url"}]), "messages[0].content", "text parts"),
    ("/v1/chat/completions", user("M", role="tool"), "messages[0].role", "should be"),
    ("/v1/chat/completions", user("M", name="x"), "messages[0].name", "left out"),
    ("/v1/chat/completions", {"n": 2}, "n", "should be 1"),
    ("/v1/chat/completions", {"stream": True}, "stream", "should be false"),
    ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools", "cannot"),
    ("/v1/chat/completions", {"response_format": {"type": "json"}}, "response_format", "format"),
    ("/v1/chat/completions", {"audio": {"voice": "x"}}, "audio", "cannot"),
    ("/v1/chat/completions", {"logit_bias": {"5": 1}}, "logit_bias", "left out"),
    ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
]  # fmt: skip


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (key, error), *others = response.json().items()
    assert key == "error"
    assert not others
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return dict(error)


@pytest.mark.parametrize(("path", "change", "param", "message"), FAULTS)
def test_a_fault_is_named(
    path: str, change: dict[str, Any], param: str, message: str, chatty: Served
) -> None:
    body = {**VALID[path], **change}
    error = error_of(chatty.http.post(path, json=body), 400)
    assert message in error["message"]
    if param != "request":
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("path", VALID)
def test_the_questions_without_a_fault_are_answered(path: str, chatty: Served) -> None:
    assert chatty.http.post(path, json=VALID[path]).status_code == 200


@pytest.mark.parametrize("path", VALID)
def test_another_model_is_not_found(path: str, chatty: Served) -> None:
    error = error_of(chatty.http.post(path, json={**VALID[path], "model": "gpt"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "'tiny'" in error["message"]


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/rank", {"candidates": [{"fields": {"title": LONG}}]}, "candidates[0]"),
        ("/v1/rerank", {"documents": ["M", LONG]}, "documents[1]"),
        ("/v1/score", {"items": ["M", LONG]}, "items[1]"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/chat/completions", user(LONG), "messages"),
    ],
)
def test_what_does_not_fit_is_refused_and_never_cut(
    path: str, change: dict[str, Any], param: str, chatty: Served
) -> None:
    error = error_of(chatty.http.post(path, json={**VALID[path], **change}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert "the model takes 4096" in error["message"]


def test_chat_needs_a_template(plain: Served) -> None:
    error = error_of(plain.http.post("/v1/chat/completions", json=CHAT), 400)
    assert error["message"] == "messages: the model has no chat template"
    assert error["param"] == "messages"


def test_what_the_template_refuses_is_a_bad_request() -> None:
    ranker = build_ranker(chat=True)
    ranker.model.tokenizer.chat_template = "{{ raise_exception('roles should alternate') }}"
    ranker.renderer.encoder.chat = False
    with serving(ranker) as http:
        error = error_of(http.post("/v1/chat/completions", json=CHAT), 400)
        assert "roles should alternate" in error["message"]
        ranker.model.tokenizer.chat_template = "{{ messages[-1].content }}"
        turns = [{"role": "system", "content": "x"}, *CHAT["messages"]]
        body = {**CHAT, "messages": turns}
        error = error_of(http.post("/v1/chat/completions", json=body), 400)
        assert error["param"] == "messages[0]"
        assert "leaves its content out" in error["message"]


def test_unknown_paths_and_methods(plain: Served) -> None:
    assert error_of(plain.http.get("/v2/rank"), 404)["code"] == "not_found"
    assert error_of(plain.http.post("/v1/rank/", json=RANK), 404)["code"] == "not_found"
    response = plain.http.get("/v1/rank")
    error = error_of(response, 405)
    assert error["code"] == "method_not_allowed"
    assert error["message"] == "there is no GET /v1/rank, use POST"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"query": NaN}', b'{"query": "\\ud800"}', b"\xff\xfe", b"[" * 9999, b"1" * 9999],
)
def test_malformed_json_is_a_bad_request(plain: Served, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error = error_of(plain.http.post("/v1/score", content=content, headers=headers), 400)
    assert error["message"].startswith("the body is not JSON: ")
    assert error["param"] is None


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"x"', b"3"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_body_that_is_no_object_is_a_bad_request(
    plain: Served, content: bytes, kind: str
) -> None:
    for path in VALID:
        response = plain.http.post(path, content=content, headers={"Content-Type": kind})
        assert "should be a JSON object" in error_of(response, 400)["message"]


def test_only_the_first_faults_are_told(plain: Served) -> None:
    body = {**RANK, "candidates": [{"field": {}}] * 100}
    message = error_of(plain.http.post("/v1/rank", json=body), 400)["message"]
    assert message.count(";") == 5
    assert message.endswith("and 195 more")


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/rank", {"candidates": RANK["candidates"] * 21}),
        ("/v1/rerank", {"documents": ["M"] * 21}),
        ("/v1/score", {"items": ["M"] * 21}),
        ("/v1/completions", {"prompt": ["M"] * 21}),
    ],
)
def test_too_many_candidates_are_refused(
    path: str, change: dict[str, Any], small: httpx.Client
) -> None:
    error = error_of(small.post(path, json={**VALID[path], **change}), 413)
    assert error["code"] == "request_too_large"
    assert error["param"] == next(iter(change))
    assert error["message"].endswith("should hold at most 20, holds 21")


@pytest.mark.parametrize("in_chunks", [False, True])
def test_too_large_a_body_is_refused(small: httpx.Client, in_chunks: bool) -> None:
    body = json.dumps({**COMPLETION, "prompt": "M" * 1_100_000}).encode()
    chunks = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    headers = {"Content-Type": "application/json"}
    response = small.post("/v1/completions", content=chunks if in_chunks else body, headers=headers)
    assert error_of(response, 413)["message"] == "the body should have at most 1,000,000 bytes"


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    """A server with low bounds."""
    with serving(build_ranker(chat=False), max_candidates=20, max_body_mb=1) as http:
        yield http


def test_scores_that_are_no_numbers_are_a_server_error() -> None:
    ranker = build_ranker(chat=True)
    with torch.no_grad():
        ranker.model.head.weight_VD.fill_(float("nan"))
    with serving(ranker) as http:
        for path, body in VALID.items():
            error = error_of(http.post(path, json=body), 500)
            assert error["code"] == "numerics_error"
            assert "the model gave" in error["message"]


def test_a_crash_is_a_server_error_without_its_details(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = build_ranker(chat=False)

    def crash(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(ranker, "prepare", crash)
    with serving(ranker) as http:
        error = error_of(http.post("/v1/rank", json=RANK), 500)
        assert error["message"] == "the server failed; its log says why"
        assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_openai_raises_its_own_errors(plain: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        plain.openai.completions.create(model="tiny", prompt="M", max_tokens=2)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        plain.openai.completions.create(model="other", prompt="M", max_tokens=1)
    assert missing.value.code == "model_not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


NAMES = [
    *("model", "id", "profile", "history", "time", "labels", "label_token_ids", "texts", "name"),
    *("top_n", "apply_softmax", "item_first", "return_documents", "logprobs", "top_logprobs"),
    *("max_completion_tokens", "stop", "n", "stream", "tools", "temperature"),
]


@st.composite
def garbage(draw: st.DrawFn) -> tuple[str, Any]:
    """A path and a valid question with some of its values replaced."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = json.loads(json.dumps(VALID[path]))

    def spoil(node: Any) -> Any:
        if draw(st.integers(0, 5)) == 0:
            return draw(JSON)
        if isinstance(node, dict):
            names = draw(st.sets(st.sampled_from(NAMES) | st.text(max_size=3), max_size=1))
            return {
                **{name: spoil(value) for name, value in node.items()},
                **{name: draw(JSON) for name in names},
            }
        return [spoil(value) for value in node] if isinstance(node, list) else node

    return path, spoil(body)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(question=garbage())
def test_garbage_is_never_a_server_error(question: tuple[str, Any], chatty: Served) -> None:
    path, body = question
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    response = chatty.http.post(path, content=content, headers=headers)
    if response.status_code != 200:
        error_of(response, response.status_code)
        assert response.status_code in (400, 404)
