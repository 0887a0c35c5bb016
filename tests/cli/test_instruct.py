"""``rankonce instruct``: conversations are shown, written and learnt from."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from rankonce.prompts.conversations import read_conversations
from tests.cli.conftest import Run, write_lines
from tests.conftest import build_request

Command = Callable[..., Run]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write labelled requests and chat data."""
    folder = tmp_path_factory.mktemp("instruct")
    examples = []
    for seed in range(14):
        request = json.loads(json.dumps(asdict(build_request(4, seed=seed))))
        examples.append({**request, "labels": ["Yes", "No", "No", None]})
    chat = [{"instruction": f"Say {n}.", "output": f"Number {n}."} for n in range(5)]
    return write_lines(folder / "examples.jsonl", examples), write_lines(
        folder / "chat.jsonl", chat
    )


def test_what_is_written_is_what_is_shown_and_reads_as_chat_data(
    run: Command, files: tuple[Path, Path], tmp_path: Path
) -> None:
    written = tmp_path / "written.jsonl"
    arguments = ("instruct", "--examples", files[0], "--chat", files[1], "--chat-share", "0.25")
    done = run(*arguments, "--write", written)
    assert (done.exit_code, done.out) == (0, "")
    conversations = list(read_conversations([written]))
    assert len(conversations) == 18
    shown = run(*arguments, "--show", "4").out
    assert shown.count("── conversation") == 4
    for conversation in conversations[:4]:
        assert all(f"[{turn.role}] {turn.content}\n" in shown for turn in conversation.turns)
    assert "[assistant] Number " in shown


def test_a_run_leaves_a_model_and_its_losses(
    run: Command, files: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        *("instruct", "--examples", files[0], "--chat", files[1], "--valid", files[1]),
        *("--model", model, "--out", out, "--max-steps", "2", "--targets-per-step", "300"),
    )
    assert done.exit_code == 0, done.err
    assert (done.out, (out / "model.safetensors").is_file()) == ("", True)
    lines = (out / "stages" / "1-instruct" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("targets", 0) >= 300 for line in lines] == [True, True, False]
    assert json.loads((out / "run.json").read_text())["data"]["instruct"]["chat_share"] == 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        ("--out", "x"),
        ("--examples", "examples.jsonl"),
        ("--examples", "examples.jsonl", "--show", "1", "--write", "x"),
        ("--chat", "chat.jsonl", "--out", "x", "--size", "1m", "--model", "y"),
    ],
)
def test_options_that_do_not_fit_are_bad_usage(
    run: Command,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(files[0].parent)
    assert run("instruct", *arguments).exit_code == 2


def test_a_faulty_record_is_named(run: Command, tmp_path: Path) -> None:
    line = {"task": "movie-like", "candidates": [{"fields": {"name": "Up"}}], "labels": ["Yes"]}
    path = write_lines(tmp_path / "bad.jsonl", [line])
    done = run("instruct", "--examples", path, "--show", "1")
    assert done.exit_code == 1
    assert "bad.jsonl: example 1: candidates[0].fields.name: unknown field" in done.err


def test_a_share_outside_its_range_is_named(run: Command, files: tuple[Path, Path]) -> None:
    done = run(
        *("instruct", "--examples", files[0], "--chat", files[1]),
        *("--chat-share", "1", "--show", "1"),
    )
    assert (done.exit_code, done.err) == (
        1,
        "error: chat_share: should lie between 0 and 1, is 1\n",
    )


def test_the_page_shows_what_the_command_prints(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page[page.index("## Instruct") : page.index("## What a prompt may know")]
    (record,) = re.findall(r"```jsonl\n(.*?)```", section, flags=re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", section, flags=re.DOTALL)
    (command,) = re.findall(r"`rankonce (.* --seed \d+)` prints", section)
    monkeypatch.chdir(tmp_path)
    Path("films.jsonl").write_text(record, encoding="utf-8")
    assert run(*command.split()).out == shown
