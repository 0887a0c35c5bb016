"""What is sent to SGLang, against the interface of its source; no live server was seen."""

import ast
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rankonce.errors import EngineError
from rankonce.serving.backends.commands import EngineCommand
from rankonce.serving.backends.opening import EngineOptions, open_ranker
from tests.serving.backends.engine_server import Plain, create_engine_app
from tests.serving.backends.test_conformance import expect, question_of
from tests.serving.conftest import serving_app

# A folder that holds the package sglang: make test-engines unpacks it.
SOURCE = "RANKONCE_SGLANG_SOURCE"
COMMAND = EngineCommand(python="python", model="/m", served_name="tiny", port=30_000)


def test_the_wire_form(plain: Plain, checkpoint: Path) -> None:
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint), packs_items=True)
    with (
        serving_app(app) as client,
        open_ranker(
            EngineOptions(engine="sglang", url=str(client.base_url), served_name="tiny"), checkpoint
        ) as ranker,
    ):
        prepared = ranker.prepare(question_of("movie-like", 3), is_checked=True)
        tokens = prepared.rendered.tokens
        (raw,) = ranker.forward([tokens])
        ((path, body),) = app.state.asked
    assert path == "/v1/score"
    assert body == {
        "model": "tiny",
        "query": list(tokens.prefix_ids),
        "items": [list(ids) for ids in tokens.segment_ids],
        "label_token_ids": [forms[0] for forms in tokens.label_ids],
        "apply_softmax": False,
        "item_first": False,
        "return_token_logprobs": True,
    }
    # Packed: the prefix once, and a delimiter before each item and behind the last.
    assert raw.computed_tokens == len(tokens.prefix_ids) + sum(map(len, tokens.segment_ids)) + 4
    assert raw.cached_tokens == 0


def test_questions_fit_the_context_even_when_they_are_packed(
    plain: Plain, checkpoint: Path
) -> None:
    app = create_engine_app(
        plain, AutoTokenizer.from_pretrained(checkpoint), max_model_len=700, packs_items=True
    )
    with (
        serving_app(app) as client,
        open_ranker(
            EngineOptions(engine="sglang", url=str(client.base_url), served_name="tiny"), checkpoint
        ) as ranker,
    ):
        prepared = ranker.prepare(question_of("movie-like", 63), is_checked=True)
        (raw,) = ranker.forward([prepared.rendered.tokens])
        sizes = [len(body["items"]) for _, body in app.state.asked]
    assert sum(sizes) == 63
    assert len(sizes) > 2
    expected = expect(plain, prepared).log_softmax(dim=1)
    assert float((raw.labels_CL - expected).abs().max()) <= 1e-5


def test_versions_that_tell_probabilities_alone(plain: Plain, checkpoint: Path) -> None:
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint))

    @app.middleware("http")
    async def forget(request, call_next):  # type: ignore[no-untyped-def]
        body = await request.body()
        request._body = body.replace(
            b'"return_token_logprobs":true', b'"return_token_logprobs":false'
        )
        return await call_next(request)

    with (
        serving_app(app) as client,
        open_ranker(
            EngineOptions(engine="sglang", url=str(client.base_url), served_name="tiny"), checkpoint
        ) as ranker,
    ):
        prepared = ranker.prepare(question_of("movie-rating", 5), is_checked=True)
        (raw,) = ranker.forward([prepared.rendered.tokens])
    expected = expect(plain, prepared).log_softmax(dim=1)
    assert float((raw.labels_CL - expected).abs().max()) <= 1e-5


def test_an_answer_with_too_few_rows_is_not_believed(plain: Plain, checkpoint: Path) -> None:
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint))

    @app.middleware("http")
    async def drop(request, call_next):  # type: ignore[no-untyped-def]
        if request.url.path == "/v1/score":
            from fastapi.responses import JSONResponse

            return JSONResponse({"token_logprobs": [[-1.0, -2.0]], "usage": {"prompt_tokens": 1}})
        return await call_next(request)

    with (
        serving_app(app) as client,
        open_ranker(
            EngineOptions(engine="sglang", url=str(client.base_url), served_name="tiny"), checkpoint
        ) as ranker,
        pytest.raises(EngineError, match="scores should be 3 rows of 2 labels"),
    ):
        ranker.score(question_of("movie-like", 3))


def test_the_command() -> None:
    assert " ".join(COMMAND.write("sglang")) == (
        "python -m sglang.launch_server --model-path /m --served-model-name tiny "
        "--host 127.0.0.1 --port 30000 --dtype auto --enable-mis --attention-backend flashinfer "
        "--disable-radix-cache --chunked-prefill-size -1"
    )


@pytest.mark.slow
def test_the_source_of_sglang_has_these_fields_and_flags() -> None:
    folder = os.environ.get(SOURCE)
    if folder is None:
        pytest.skip(f"no source: make test-engines unpacks it, or set {SOURCE}")
    source = Path(folder) / "sglang" / "srt"
    protocol = source / "entrypoints" / "openai" / "protocol.py"
    question = _fields(protocol, "ScoringRequest")
    assert question >= {
        *("model", "query", "items", "label_token_ids", "apply_softmax", "item_first"),
        "return_token_logprobs",
    }
    assert _fields(protocol, "ScoringResponse") >= {"scores", "token_logprobs", "usage"}
    assert _fields(protocol, "ModelCard") >= {"id", "max_model_len"}
    assert _fields(protocol, "TokenizeRequest") >= {"model", "prompt", "add_special_tokens"}
    routes = (source / "entrypoints" / "http_server.py").read_text()
    for route in ("/v1/score", "/v1/models", "/tokenize", "/health"):
        assert f'"{route}"' in routes
    flags = {
        name
        for path in (source / "arg_groups" / "fields").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        for name in [node.target.id]
    }
    wanted = {one[2:].replace("-", "_") for one in COMMAND.write("sglang") if one[:2] == "--"}
    assert wanted <= flags
    assert (source.parent / "launch_server.py").is_file()
    # What the packed form is read from: 16-bit positions, delimiters, no cache.
    scoring = (source / "managers" / "tokenizer_manager_score_mixin.py").read_text()
    assert "query<delimiter>item1<delimiter>item2<delimiter>item3<delimiter>" in scoring
    attention = (source / "layers" / "attention" / "flashinfer_backend.py").read_text()
    assert "torch.uint16" in attention


def _fields(path: Path, name: str) -> set[str]:
    tree = ast.parse(path.read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        one.target.id
        for one in found.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
