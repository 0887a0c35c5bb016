import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from rankonce.cli.serve import serve
from rankonce.errors import MissingDependencyError, OperationsError
from rankonce.serving.app import open_listener
from rankonce.serving.batches.folder import DataFolder
from rankonce.serving.engine import ServerConfig
from tests.conftest import build_network, build_tokenizer

app = typer.Typer()
app.command()(serve)
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
COMMAND = "import typer; from rankonce.cli.serve import serve; typer.run(serve)"


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """Give loggers and SIGTERM back as they were: the command takes them for itself."""
    root, levels = logging.getLogger(), {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    for name in ("rankonce", "uvicorn"):
        levels[name] = logging.getLogger(name).level
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_serve_answers_until_it_is_told_to_stop(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-ranker"
    build_network("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    arguments = ["--model", str(folder), "--max-tokens-per-pass", "4096"]
    _serve_and_stop(arguments, ["tiny-ranker"])


def test_serve_takes_several_models_by_their_names(tmp_path: Path) -> None:
    arguments = ["--allow-adapter-loading"]
    for name, architecture in (("small", "llama"), ("other", "qwen3")):
        build_network(architecture).save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
        arguments += ["--model", f"{name}={tmp_path / name}"]
    _serve_and_stop(arguments, ["small", "other"])


def _serve_and_stop(arguments: list[str], models: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(found[0] for found in map(ADDRESS.search, lines) if found)
            with httpx.Client(base_url=address, timeout=60) as http:
                assert http.get("/health").json()["model"] == models[0]
                for model in models:
                    question = {"prompt": "M", "max_tokens": 1, "model": model}
                    answer = http.post("/v1/completions", json=question)
                    assert (answer.status_code, answer.json()["model"]) == (200, model)
            process.send_signal(signal.SIGINT)
            out, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out == ""
    assert "rankonce.access: POST /v1/completions 200 request_id=" in log
    assert "Traceback" not in log


def test_sigterm_stops_a_server_that_still_loads(tmp_path: Path) -> None:
    # A model that never comes: opening a pipe that nobody writes to waits.
    os.mkfifo(tmp_path / "config.json")
    arguments = ["--model", str(tmp_path), "--port", "0", "--host", "0.0.0.0"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stderr is not None
            # The warning comes before the weights are read.
            assert "ANYONE WHO REACHES" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_answers_do_not_wait_for_nagle() -> None:
    # asyncio switches Nagle's algorithm off only for sockets that name their protocol.
    with open_listener(ServerConfig(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["--port", port, "--model", "no-such-folder"])
    assert isinstance(result.exception, OSError)
    assert port in str(result.exception)


def test_a_taken_data_folder_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    arguments = ["--port", "0", "--model", "no-such-folder", "--data-dir", str(tmp_path)]
    with closing(DataFolder(tmp_path)):
        result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, OSError)
    assert "another server uses it" in str(result.exception)


@pytest.mark.parametrize("library", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_missing_library_is_named_with_its_extra(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = CliRunner().invoke(app, ["--port", "0"])
    assert isinstance(result.exception, MissingDependencyError)
    shown = library.replace("_", "-")
    assert f"{shown} is not installed: pip install 'rankonce[serve]'" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "example.org"], True),
        (["--host", "0.0.0.0", "--api-keys", "KEYS"], False),
        (["--host", "127.0.0.1"], False),
        (["--host", "::1"], False),
        (["--host", "localhost"], False),
        ([], False),
    ],
)
def test_others_on_the_network_without_keys_are_warned_of(
    arguments: list[str],
    is_warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("search:kIs3o0y8PqLw2ZrVt6nB")
    keys.chmod(0o600)

    def stop(*_: object) -> None:
        raise typer.Abort

    # The warning comes before the port is taken and the weights are read.
    monkeypatch.setattr("rankonce.serving.app.open_listener", stop)
    arguments = [str(keys) if one == "KEYS" else one for one in arguments]
    with pytest.raises(typer.Abort):
        get_command(app).main(arguments, standalone_mode=False)
    assert ("ANYONE WHO REACHES" in capsys.readouterr().err) is is_warned


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_strangers_cannot_be_let_load_adapters(host: str) -> None:
    # Refused before the port is taken: the name of this host is not even looked up.
    result = CliRunner().invoke(app, ["--host", host, "--port", "0", "--allow-adapter-loading"])
    assert result.exit_code == 2
    assert "give keys with --api-keys" in " ".join(result.output.replace("│", " ").split())


def test_a_fault_in_the_keys_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("search:short")
    arguments = ["--api-keys", str(keys), "--model", "no-such-folder", "--port", "0"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, OperationsError)
    assert "line 1: a key should have at least 16 characters" in str(result.exception)


@pytest.mark.parametrize(
    "arguments", [["--port", "x"], ["--port", "65536"], ["--prot", "1"], ["--log-format", "xml"]]
)
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
