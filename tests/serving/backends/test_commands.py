"""rankonce score and serve over another engine: what goes in, what comes out, bad usage."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankonce.cli import main
from rankonce.ranker import EMBEDDED_MODEL, Ranker
from rankonce.serving.backends.processes import ServerProcess, free_port, running
from tests.serving.backends.conftest import vllm_python
from tests.serving.backends.engine_server import BreakingProxy, breaking_proxy
from tests.serving.backends.test_conformance import TASKS, question_of

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(one) for one in arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        # A box of rich breaks lines and frames them.
        return status, out, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(body_of(name, 5)) + "\n" for name in TASKS))
    return path


def body_of(task: str, num_candidates: int) -> dict[str, Any]:
    question = question_of(task, num_candidates)
    return {
        "task": task,
        "time": question.time,
        "profile": dict(question.profile),
        "history": [
            {"item": {"fields": dict(e.item.fields)}, "action": e.action, "time": e.time}
            for e in question.history
        ],
        "candidates": [{"fields": dict(one.fields)} for one in question.candidates],
    }


def check_lines(lines: str, checkpoint: Path, tolerance: float) -> None:
    ranker = Ranker.from_pretrained(checkpoint)
    results = [json.loads(line) for line in lines.splitlines()]
    assert len(results) == len(TASKS)
    for name, result in zip(TASKS, results, strict=True):
        expected = ranker.score(question_of(name, 5))
        found = [one["log_probs"] for one in result["candidates"]]
        for row, candidate in zip(found, expected.candidates, strict=True):
            assert row == pytest.approx(candidate.log_probs, abs=tolerance)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_score_joins_an_engine(
    kind: str, run: Run, requests: Path, checkpoint: Path, engine_url: str
) -> None:
    at = ("--engine", kind, "--engine-url", engine_url, "--engine-model", "tiny")
    status, out, err = run("score", requests, "--model", checkpoint, *at)
    assert status == 0, err
    check_lines(out, checkpoint, 1e-5)


def test_score_keeps_what_was_scored_before_the_engine_died(
    run: Run, checkpoint: Path, engine_url: str, tmp_path: Path, requests: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    with breaking_proxy(engine_url) as proxy:
        _die_after(proxy, num_questions=12)
        arguments = ("score", requests, "--model", checkpoint, "--out", out, "--engine", "vllm")
        arguments += ("--engine-model", "tiny", "--max-tokens-per-pass", 1)
        status, _, err = run(*arguments, "--engine-url", proxy.url)
    assert status == 1
    assert "does not answer" in err
    num_done = len(out.read_text().splitlines())
    assert 0 < num_done < len(TASKS)
    status, _, err = run(*arguments, "--engine-url", engine_url, "--resume")
    assert status == 0, err
    assert f"resumed after {num_done}" in err
    check_lines(out.read_text(), checkpoint, 1e-5)


def _die_after(proxy: BreakingProxy, *, num_questions: int) -> None:
    proxy.num_to_pass, proxy.num_to_break = num_questions, 1_000_000


def test_serve_joins_an_engine(checkpoint: Path, engine_url: str, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "rankonce.cli", "serve", "--port", str(port)]
    command += ["--model", str(checkpoint), "--engine", "vllm", "--engine-url", engine_url]
    command += ["--engine-model", "tiny"]
    server = ServerProcess(command, port=port, log=tmp_path / "log", health="/ready")
    with running(server, timeout_s=120):
        answer = httpx.post(f"{server.url}/v1/rank", json=body_of("movie-like", 3), timeout=60)
    assert answer.status_code == 200, answer.text
    expected = Ranker.from_pretrained(checkpoint).score(question_of("movie-like", 3))
    found = {one["index"]: one["value"] for one in answer.json()["results"]}
    assert [found[i] for i in range(3)] == pytest.approx(
        [one.value for one in expected.candidates], abs=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        ("vllm", "-m vllm.entrypoints.openai.api_server --model"),
        ("sglang", "-m sglang.launch_server --model-path"),
    ],
)
def test_serve_prints_the_command_of_an_engine(kind: str, begin: str, run: Run) -> None:
    status, out, _ = run(
        *("serve", "--engine", kind, "--engine-python", "/opt/my engine/python"),
        *("--engine-args", "--max-model-len 512", "--precision", "bf16", "--print-engine-command"),
    )
    assert status == 0
    command = shlex.split(out)
    assert command[0] == "/opt/my engine/python"
    assert begin in out
    assert str(EMBEDDED_MODEL) in command
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert command[-2:] == ["--max-model-len", "512"]


URL = ("--engine-url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (URL, "goes with another --engine than native"),
        (("--engine-python", "python"), "goes with another --engine than native"),
        (("--engine", "tgi"), "'tgi' is not one of"),
        (("--engine", "vllm", "--engine-url", "localhost:8000"), "should begin with http://"),
        (("--engine", "vllm", *URL, "--engine-python", "p"), "--engine-url joins one that runs"),
        (("--engine", "vllm", *URL, "--engine-args", "--x"), "--engine-url joins one that runs"),
        (("--engine", "vllm", *URL, "--precision", "fp32"), "is settled by the engine"),
        (("--engine", "vllm", "--prefix-cache-mb", "5"), "does not go with --engine vllm"),
        (("--engine", "sglang", "--adapter", "a=b"), "does not go with --engine sglang"),
        (("--engine", "vllm", "--device", "cpu"), "does not go with --engine vllm"),
        (("--engine", "vllm", "--keep", "*"), "does not go with --engine vllm"),
    ],
)
def test_options_that_contradict_each_other_are_bad_usage(
    arguments: tuple[str, ...], expected: str, run: Run, requests: Path
) -> None:
    for command in (("score", requests), ("serve",)):
        status, _, err = run(*command, *arguments)
        assert status == 2, err
        assert expected in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "a=b", "--model", "c=d"), "gives one model for --engine vllm"),
        (("--allow-adapter-loading",), "does not go with --engine vllm"),
        ((*URL, "--print-engine-command"), "goes with an --engine that is started"),
    ],
)
def test_what_serve_refuses_besides(arguments: tuple[str, ...], expected: str, run: Run) -> None:
    status, _, err = run("serve", "--engine", "vllm", *arguments)
    assert status == 2, err
    assert expected in err


def test_an_engine_that_is_away_is_a_failure(run: Run, requests: Path, checkpoint: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    at = ("--engine", "vllm", "--engine-url", url)
    status, out, err = run("score", requests, "--model", checkpoint, *at)
    assert (status, out) == (1, "")
    assert f"error: engine: vllm at {url} does not answer" in err
    status, _, err = run("score", requests, "--model", checkpoint, "--engine", "sglang")
    assert status == 1
    assert "error: engine: sglang is not installed in the Python that runs RankOnce" in err


@pytest.mark.slow
def test_score_starts_a_vllm_server(run: Run, requests: Path, checkpoint: Path) -> None:
    at = ("--engine", "vllm", "--engine-python", vllm_python())
    status, out, err = run("score", requests, "--model", checkpoint, *at)
    assert status == 0, err
    check_lines(out, checkpoint, 2e-4)


@pytest.mark.slow
def test_score_loads_vllm_into_its_own_process(requests: Path, checkpoint: Path) -> None:
    done = subprocess.run(
        [
            *(vllm_python(), "-m", "rankonce.cli", "score", requests, "--model", checkpoint),
            *("--engine", "vllm", "--engine-args", "--max-model-len 2048"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_lines(done.stdout, checkpoint, 2e-4)
