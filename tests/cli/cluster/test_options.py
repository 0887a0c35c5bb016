"""Options of ``--ray``: which contradict each other, and what is said where Ray is missing."""

import logging
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce.cli.cluster.scoring import _describe_scores
from rankonce.cli.cluster.worker import explain
from rankonce.errors import ModelError
from tests.cli.conftest import Run, write_lines

Command = Callable[..., Run]
LOADING: dict[str, Any] = {
    "model": None,
    "task_files": [],
    "device": None,
    "precision": None,
    "keep": None,
    "chat": None,
    "label_mass": False,
    "adapters": None,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", ["{}"])


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    """Give handlers back that the server's command takes."""
    root, on_sigterm = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--workers", "2"), "--workers: goes with --ray"),
        (("--shard-rows", "2"), "--shard-rows: goes with --ray"),
        (("--ray-address", "auto"), "--ray-address: goes with --ray"),
        (("--out", "FOLDER"), "--out: should be a file"),
        (("--ray",), "--out: --ray needs a folder for its shards"),
        (("--ray", "--out", "FILE"), "--out: --ray needs a folder for its shards"),
        (("--ray", "--out", "new", "--rejects", "r"), "--rejects: does not go with --ray"),
        (("--ray", "--out", "new", "--ray-address", "ray://a:1"), "--ray-address: should be HOST"),
        (("--ray", "--out", "new", "--ray-address", "head"), "--ray-address: should be HOST"),
        (
            ("--ray", "--out", "new", "--engine", "vllm"),
            "--engine: workers of --ray hold the model",
        ),
    ],
)
def test_what_score_cannot_do_with_or_without_ray_is_bad_usage(
    run: Command, file: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    places = {"FOLDER": str(tmp_path), "FILE": str(file)}
    done = run("score", file, *(places.get(option, option) for option in options))
    assert (done.exit_code, done.out) == (2, "")
    assert fault in unboxed(done.err)


def test_ray_does_not_read_stdin(run: Command, tmp_path: Path) -> None:
    done = run("score", "-", "--ray", "--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "REQUESTS: --ray reads a file where each shard begins" in unboxed(done.err)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--replicas", "2"), "--replicas: goes with --ray"),
        (("--max-replicas", "2"), "--max-replicas: goes with --ray"),
        (("--target-questions", "2"), "--target-questions: goes with --ray"),
        (("--ray", "--replicas", "3", "--max-replicas", "2"), "should be at least --replicas, 3"),
        (("--ray", "--target-questions", "2"), "--target-questions: goes with --max-replicas"),
        (("--ray", "--data-dir", "new"), "--data-dir: does not go with --ray: files and batches"),
        (("--ray", "--allow-adapter-loading"), "--allow-adapter-loading: does not go with --ray"),
        (("--ray", "--header-timeout", "10"), "--header-timeout: does not go with --ray"),
        (("--ray", "--write-timeout", "30"), "--write-timeout: does not go with --ray"),
        (("--ray", "--drain-delay", "1"), "--drain-delay: does not go with --ray"),
        (("--ray", "--engine", "vllm"), "--engine: workers of --ray hold the model themselves"),
    ],
)
def test_what_serve_cannot_do_with_or_without_ray_is_bad_usage(
    run: Command, options: tuple[str, ...], fault: str
) -> None:
    done = run("serve", *options)
    assert (done.exit_code, done.out) == (2, "")
    assert fault in unboxed(done.err)


def test_limits_that_each_replica_would_count_are_refused(run: Command, tmp_path: Path) -> None:
    keys = write_lines(tmp_path / "keys", ["feed:0123456789abcdef0 tokens_per_minute=7"])
    keys.chmod(0o600)
    for options in (("--requests-per-minute", "5"), ("--api-keys", keys)):
        done = run("serve", "--ray", *options)
        assert done.exit_code == 1
        assert "per minute do not go with --ray" in done.err


def test_a_port_has_to_be_named_and_free(run: Command) -> None:
    done = run("serve", "--ray", "--port", "0")
    assert done.exit_code == 1
    assert "error: --port: every proxy of --ray has the same one" in done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--ray", "--port", port)
    assert done.exit_code == 1
    assert f"port {port}: Address already in use" in done.err


def test_without_ray_the_extra_is_named(
    run: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    for command in (("score", file, "--out", out), ("serve", "--port", free_port())):
        done = run(*command, "--ray")
        assert (done.exit_code, done.out) == (1, "")
        assert "error: ray is not installed: pip install 'rankonce[ray]'" in done.err
    assert not out.exists()


def test_what_decides_the_scores_is_told_apart(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = (Path(__file__).parents[3] / "rankonce/prompts/library/movie-like.yaml").read_text()
    own.write_text(text)
    described = [_describe_scores({**LOADING, "task_files": [own]})]
    own.write_text(text.replace("question: ", "question: Well, "))
    changes: list[dict[str, Any]] = [
        {"task_files": [own]},
        {},
        {"model": str(model)},
        {"precision": "bf16"},
        {"label_mass": True},
        {"chat": False},
        {"keep": ["*.down_proj"]},
    ]
    described += [_describe_scores({**LOADING, **change}) for change in changes]
    for place, one in enumerate(described):
        assert one not in described[:place]
    # Where the model stands, and how much of it runs at a time, do not count.
    copied = {**LOADING, "model": str(model), "device": "cpu", "max_tokens_per_pass": 7}
    assert _describe_scores(copied) in described


def test_memory_that_ends_is_told_from_bugs() -> None:
    with pytest.raises(RuntimeError) as ended:
        torch.empty(1 << 50)
    for error in (ended.value, MemoryError()):
        assert explain(error).startswith("the worker is out of memory (")
        assert "--max-tokens-per-pass" in explain(error)
    assert explain(ModelError("model: no")) == "model: no"
    with pytest.raises(RuntimeError, match="a bug"):
        explain(RuntimeError("a bug"))


def test_a_task_of_the_client_names_a_member_by_a_digest() -> None:
    from rankonce.client import SESSION_HEADER, rank_call

    call = rank_call({"task": "movie-like"}, {"member": "Zoë\n", "top_n": 1})
    assert call.body == {"task": "movie-like", "top_n": 1}
    digest = call.headers[SESSION_HEADER]
    assert digest.isascii()
    assert len(digest) == 64
    assert rank_call({}, {"member": "Zoe"}).headers[SESSION_HEADER] != digest
    assert rank_call({}, {}).headers == {}
    assert pickle.loads(pickle.dumps(call)) == call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def unboxed(text: str) -> str:
    """Undo the frame that typer draws around a fault."""
    lines = (line.strip("│╭╮╰╯─ ") for line in text.splitlines())
    return " ".join(lines).replace("Invalid value for ", "").replace("'", "")
