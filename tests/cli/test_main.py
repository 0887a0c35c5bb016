"""What every command has in common."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankonce import __version__, cli
from rankonce.errors import ModelError
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]
Command = Callable[..., Run]


def test_the_version_is_printed(run: Command) -> None:
    assert run("--version") == Run(0, f"rankonce {__version__}\n", "")


def test_without_a_command_help_is_shown(run: Command) -> None:
    done = run()
    assert done.exit_code == 2
    assert "explain-prompt" in done.out + done.err


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "score",
        "explain-prompt",
        "tasks",
        "datasets",
        "serve",
        "train",
        "pretrain",
        "evaluate",
        "simulate",
        "experiment",
        "prune",
        "bench",
    ],
)
def test_every_command_has_help(run: Command, name: str) -> None:
    done = run(name, "--help")
    assert (done.exit_code, done.err) == (0, "")
    assert f"Usage: rankonce {name}" in done.out


def test_an_unknown_command_is_bad_usage(run: Command) -> None:
    done = run("rank")
    assert (done.exit_code, done.out) == (2, "")
    assert "No such command 'rank'" in done.err


def test_help_needs_no_heavy_import() -> None:
    heavy = ("torch", "transformers", "numpy", "pyarrow", "polars", "fastapi", "uvicorn", "rich")
    code = f"import sys, rankonce.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_our_errors_are_one_line_and_exit_with_1(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ModelError("model: has no head"), FileNotFoundError(2, "No such file", "a.txt")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        assert run("score") == Run(1, "", f"error: {error}\n")


def test_faults_of_the_program_itself_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["score"])


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from rankonce.cli import main; main()' tasks movie-like"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "name:"
    assert "Traceback" not in done.stderr


def test_v_logs_on_stderr(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[object] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: levels.append(given["level"]))
    run("tasks")
    run("-v", "tasks")
    assert levels == [logging.WARNING, logging.INFO]
