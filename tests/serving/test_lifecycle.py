"""A real process warms up, drains on SIGTERM and ends with exit code 0."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from rankonce.serving.app import open_listener, run_server
from rankonce.serving.engine import ServerConfig
from rankonce.serving.lifecycle import Lifecycle, Phase
from rankonce.serving.operations import OperationsConfig
from tests.conftest import build_network, build_tokenizer
from tests.serving.conftest import build_ranker, serving

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
COMMAND = "import sys; from rankonce.cli import main; main(sys.argv[1:])"
# Long enough to be running when the signal comes, also on a fast machine.
LONG = {"prompt": [f"M {number} " + "x " * 700 for number in range(40)], "max_tokens": 1}
SHORT = {"prompt": "M", "max_tokens": 1}


@dataclass(kw_only=True)
class Process:
    """A server in a process of its own, and what it logs."""

    popen: subprocess.Popen[str]
    http: httpx.Client
    lines: list[str] = field(default_factory=list)

    def ask(self, path: str) -> httpx.Response:
        return self.http.get(path, headers={"Connection": "close"})

    def wait_for(self, path: str, status: int) -> None:
        deadline = time.monotonic() + 60
        while self.ask(path).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-ranker"
    build_network("llama").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Process]:
    arguments = ["serve", "--model", str(folder), "--port", "0", "--log-format", "json", *options]
    popen = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    address = threading.Event()

    def read() -> None:
        assert popen.stderr is not None
        for line in popen.stderr:
            lines.append(line)
            if ADDRESS.search(line):
                address.set()
        address.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert address.wait(120)
        urls = [found[0] for found in map(ADDRESS.search, lines) if found]
        assert urls, "".join(lines)
        with httpx.Client(base_url=urls[0], timeout=60) as http:
            yield Process(popen=popen, http=http, lines=lines)
    finally:
        popen.kill()
        popen.wait()
        reader.join()
        assert popen.stderr is not None
        popen.stderr.close()


def test_sigterm_finishes_what_runs_and_exits_with_0(folder: Path) -> None:
    with running(folder, "--drain-delay", "0.5", "--drain-timeout", "60") as process:
        process.wait_for("/ready", 200)
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(process.http.post("/v1/completions", json=LONG))

        asking = threading.Thread(target=ask)
        asking.start()
        while "rankonce_requests_in_flight 2.0" not in process.ask("/metrics").text:
            assert asking.is_alive()
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("/ready", 503)
        # It still takes what a load balancer sends before it has noticed, and asks clients to go.
        late = process.ask("/health")
        assert late.status_code == 200
        assert late.headers["connection"] == "close"
        assert process.popen.wait(60) == 0
        asking.join()
        assert [answer.status_code for answer in answers] == [200]
        assert len(answers[0].json()["choices"]) == 40
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{process.http.base_url}/health")
        assert all(record["level"] != "error" for record in process.records())
        messages = [str(record["message"]) for record in process.records()]
        assert any(message.startswith("warm-up: ") for message in messages)


def test_what_takes_longer_than_the_bound_is_told_so(folder: Path) -> None:
    with running(folder, "--drain-timeout", "1", "--cold") as process:
        process.wait_for("/ready", 200)
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {**LONG, "prompt": LONG["prompt"] * 30}  # type: ignore[operator]
            answers.append(process.http.post("/v1/completions", json=body))

        asking = threading.Thread(target=ask)
        asking.start()
        while "rankonce_requests_in_flight 2.0" not in process.ask("/metrics").text:
            assert asking.is_alive()
        process.popen.send_signal(signal.SIGTERM)
        asking.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "shutting_down"
        assert answers[0].headers["retry-after"] == "1"
        assert process.popen.wait(60) == 0


def test_a_server_whose_warm_up_fails_is_never_ready_and_stops_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranker = build_ranker(chat=False)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(ranker, "prepare", crash)
    config = ServerConfig(port=0)
    with open_listener(config) as listener:
        outcomes: list[bool] = []
        thread = threading.Thread(
            target=lambda: outcomes.append(run_server(ranker, config, listener))
        )
        thread.start()
        thread.join(30)
        assert outcomes == [False]
    assert "the warm-up failed: this server is not ready" in caplog.text


def test_a_server_is_not_ready_before_its_warm_up_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranker = build_ranker(chat=False)
    go_on = threading.Event()
    prepare = ranker.prepare

    def wait(*arguments: object, **options: object) -> object:
        go_on.wait(30)
        return prepare(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ranker, "prepare", wait)
    with serving(ranker, OperationsConfig()) as http:
        assert http.get("/health").status_code == 200
        response = http.get("/ready")
        assert (response.status_code, response.json()) == (503, {"status": "warming_up"})
        assert "rankonce_ready 0.0" in http.get("/metrics").text
        go_on.set()
        deadline = time.monotonic() + 30
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
        assert http.get("/ready").json() == {"status": "ready"}
        assert "rankonce_ready 1.0" in http.get("/metrics").text


def test_draining_and_failing_are_final() -> None:
    draining, failed = Lifecycle(), Lifecycle()
    draining.drain()
    draining.finish_warm_up()
    assert draining.phase is Phase.DRAINING
    failed.fail()
    failed.drain()
    failed.finish_warm_up()
    assert failed.phase is Phase.FAILED
