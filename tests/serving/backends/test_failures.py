"""Engines that are away, die, or are not what they should be."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from rankonce.errors import EngineError, ModelError
from rankonce.ranker import Ranker
from rankonce.serving.backends.opening import EngineOptions, open_ranker
from rankonce.serving.backends.processes import ServerProcess, free_port, running
from rankonce.serving.backends.remote import RemoteConfig
from rankonce.serving.backends.scorer import EngineScorer
from rankonce.serving.backends.vllm import VllmServer
from tests.serving.backends.engine_server import (
    BreakingProxy,
    Plain,
    breaking_proxy,
    create_engine_app,
)
from tests.serving.backends.test_conformance import expect, question_of
from tests.serving.conftest import serving, serving_app

KINDS = ("vllm", "sglang")


@pytest.fixture
def proxy(engine_url: str) -> Iterator[BreakingProxy]:
    with breaking_proxy(engine_url) as proxy:
        yield proxy


def options_of(kind: str, url: str, **more: Any) -> EngineOptions:
    return EngineOptions(engine=kind, url=url, **{"served_name": "tiny", **more})


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_dies_in_mid_request_is_asked_again(
    kind: str, proxy: BreakingProxy, checkpoint: Path, plain: Plain
) -> None:
    with open_ranker(options_of(kind, proxy.url), checkpoint) as ranker:
        prepared = ranker.prepare(question_of("movie-like", 7), is_checked=True)
        proxy.num_to_break = 1
        (raw,) = ranker.forward([prepared.rendered.tokens])
        assert proxy.num_broken == 1
        expected = expect(plain, prepared).log_softmax(dim=1)
        assert float((raw.labels_CL - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_death_is_a_clear_error_and_no_half_a_request_is_scored(
    kind: str, proxy: BreakingProxy, checkpoint: Path
) -> None:
    with open_ranker(options_of(kind, proxy.url), checkpoint) as ranker:
        prepared = ranker.prepare(question_of("movie-like", 7), is_checked=True)
        proxy.num_to_break = 2
        opened = ranker.scorer.open_request(prepared.rendered.tokens)
        with pytest.raises(EngineError, match=f"{kind} at {proxy.url} does not answer: "):
            ranker.scorer.run_pass([(opened, 7)])
        assert proxy.num_broken == 2
        assert (opened.num_done, opened.pieces) == (0, [])
        # It is back, and so are the scores.
        ranker.scorer.run_pass([(opened, 7)])
        assert opened.is_done


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_over_a_dead_engine_is_not_ready_and_says_so_without_its_address(
    kind: str, proxy: BreakingProxy, checkpoint: Path
) -> None:
    body = {"query": [5, 6], "items": [[7], [8]], "label_token_ids": [9, 10]}
    with (
        open_ranker(options_of(kind, proxy.url), checkpoint) as ranker,
        serving(ranker, served_model_name="served") as http,
    ):
        assert http.get("/ready").status_code == 200
        assert "rankonce_ready 1" in http.get("/metrics").text
        assert http.post("/v1/score", json=body).status_code == 200
        proxy.die()
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "engine_down"})
        assert "rankonce_ready 0" in http.get("/metrics").text
        answer = http.post("/v1/score", json=body)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert "127.0.0.1" not in answer.text
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_url_that_does_not_answer(kind: str, checkpoint: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        pytest.raises(EngineError, match=f"engine: {kind} at {url} does not answer: .*refused"),
        open_ranker(options_of(kind, url), checkpoint),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_another_name(kind: str, engine_url: str, checkpoint: Path) -> None:
    expected = "serves 'tiny', not 'other'; say with --engine-model"
    with (
        pytest.raises(EngineError, match=expected),
        open_ranker(options_of(kind, engine_url, served_name="other"), checkpoint),
    ):
        pass


def test_a_url_of_something_else(checkpoint: Path) -> None:
    from fastapi import FastAPI

    with (
        serving_app(FastAPI()) as client,
        pytest.raises(EngineError, match="refused /v1/models: status 404"),
        open_ranker(options_of("vllm", str(client.base_url)), checkpoint),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_label_words_that_the_engine_splits(kind: str, plain: Plain, checkpoint: Path) -> None:
    # The tokenizer of another checkpoint: bytes are its tokens.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    app = create_engine_app(plain, PreTrainedTokenizerFast(tokenizer_object=backend))
    with (
        serving_app(app) as client,
        pytest.raises(ModelError, match=rf"tokenizer: the engine {kind} makes \[.*\] of '\w+', "),
        open_ranker(options_of(kind, str(client.base_url)), checkpoint),
    ):
        pass


def test_an_engine_that_keeps_its_tokens_to_itself_is_taken(plain: Plain, checkpoint: Path) -> None:
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint))
    app.router.routes[:] = [one for one in app.router.routes if one.path != "/tokenize"]
    with (
        serving_app(app) as client,
        open_ranker(options_of("vllm", str(client.base_url)), checkpoint) as ranker,
    ):
        assert ranker.score(question_of("movie-like", 2)).usage.computed_tokens > 0


def test_an_engine_that_leaves_labels_out_is_not_believed(plain: Plain, checkpoint: Path) -> None:
    """Versions of vLLM without logprob_token_ids ignore it and give the most probable tokens."""
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint))

    @app.middleware("http")
    async def forget(request: Any, call_next: Any) -> Any:
        body = await request.body()
        request._body = body.replace(b"logprob_token_ids", b"unknown")
        return await call_next(request)

    with (
        serving_app(app) as client,
        open_ranker(options_of("vllm", str(client.base_url)), checkpoint) as ranker,
        pytest.raises(EngineError, match="in another form than /v1/completions has here"),
    ):
        ranker.score(question_of("movie-like", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_engine_refuses_is_quoted(kind: str, engine_url: str, checkpoint: Path) -> None:
    with open_ranker(options_of(kind, engine_url), checkpoint) as ranker:
        backend = ranker.scorer.backend  # type: ignore[attr-defined]
        backend.config = replace(backend.config, model="gone")
        with pytest.raises(EngineError, match="status 404: The model `gone` does not exist"):
            ranker.score(question_of("movie-like", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_is_not_installed(kind: str, checkpoint: Path) -> None:
    python = EngineOptions(engine=kind, python=Path(sys.executable))
    for options, place in (
        (EngineOptions(engine=kind), "in the Python that runs RankOnce"),
        (python, f"for {sys.executable}"),
    ):
        with (
            pytest.raises(EngineError, match=f"{kind} is not installed {place}; name the Python"),
            open_ranker(options, checkpoint),
        ):
            pass
    absent = EngineOptions(engine=kind, python=Path("/absent/python"))
    with (
        pytest.raises(EngineError, match="engine-python: there is no /absent/python"),
        open_ranker(absent, checkpoint),
    ):
        pass


def test_an_adapter_is_no_checkpoint_of_an_engine(engine_url: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with (
        pytest.raises(ModelError, match=r"takes whole checkpoints; merge it .*rankonce merge"),
        open_ranker(options_of("vllm", engine_url), tmp_path),
    ):
        pass


def test_weights_that_are_elsewhere_are_not_to_be_had(engine_url: str, checkpoint: Path) -> None:
    with open_ranker(options_of("vllm", engine_url), checkpoint) as ranker:
        with pytest.raises(ModelError, match="are in another engine"):
            _ = ranker.loaded
        with pytest.raises(ModelError, match="are in another engine"):
            Ranker(ranker.model)


def test_a_precision_that_an_engine_has_not(checkpoint: Path) -> None:
    options = EngineOptions(engine="vllm", precision="nf4")
    with pytest.raises(EngineError, match="vllm should have one of fp32, bf16, fp16, is nf4"):
        options.command(checkpoint, port=1)


@pytest.mark.slow
def test_a_vllm_that_is_killed_in_mid_request_is_reported_with_the_end_of_its_log(
    checkpoint: Path, tmp_path: Path
) -> None:
    from tests.serving.backends.conftest import vllm_python

    options = EngineOptions(engine="vllm", python=vllm_python(), served_name="tiny")
    port = free_port()
    process = ServerProcess(
        options.command(checkpoint, port=port).write("vllm"),
        port=port,
        log=tmp_path / "log",
        environment={"PYTHONPATH": ""},
    )
    with (
        running(process, timeout_s=900),
        closing(
            VllmServer(RemoteConfig(url=process.url, model="tiny", tell_fate=process.log_tail))
        ) as backend,
        open_ranker(replace(options, url=process.url, python=None), checkpoint) as known,
    ):
        ranker = Ranker(known.model, scorer=EngineScorer(backend))
        ranker.score(question_of("movie-like", 2))
        backend.check()
        asked = [ranker.prepare(question_of("movie-like", 500), is_checked=True)] * 8
        killer = threading.Timer(0.5, lambda: os.killpg(process.pid, signal.SIGKILL))
        began = time.monotonic()
        killer.start()
        with pytest.raises(EngineError, match=f"vllm at {process.url} does not answer: ") as caught:
            ranker.forward([one.rendered.tokens for one in asked])
        assert time.monotonic() - began < 60
        assert "POST /v1/completions" in str(caught.value) or "INFO" in str(caught.value)
        with pytest.raises(EngineError, match="does not answer"):
            backend.check()
    assert not process.is_running
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url)
