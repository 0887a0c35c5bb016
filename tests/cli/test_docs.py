"""The worked example of docs/prompts.md runs and prints what the page shows."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rankonce.prompts.tasks import library_tasks
from tests.cli.conftest import Run

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(text)


def prompt_of(explanation: str) -> str:
    """Return the text of prefix and segments, without what depends on the tokenizer."""
    text = explanation[explanation.index("── prefix") : explanation.index("── labels")]
    return re.sub(r"\d+ tokens", "tokens", text.replace("⟦<s>⟧", ""))


def test_the_worked_example_runs_as_shown(
    run: Callable[..., Run], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("film-night.yaml").write_text(block("yaml"), encoding="utf-8")
    Path("evening.json").write_text(block("json"), encoding="utf-8")
    Path("evenings.jsonl").write_text(json.dumps(json.loads(block("json"))), encoding="utf-8")
    commands = [line.split() for line in block("sh").splitlines() if line.startswith("rankonce")]
    check, explain, score = (command[1:] for command in commands)
    assert run(*check).exit_code == 0
    shown = run(*explain, "--model", model, "--plain")
    assert prompt_of(shown.out) == prompt_of(block("text"))
    history = r"(?s)── history.*?\n(.*?) which adds"
    assert re.findall(history, shown.out) == re.findall(history, PAGE)
    (record,) = run(*score, "--model", model).records
    assert [candidate["id"] for candidate in record["candidates"]] == ["m1", "m2"]


def test_the_page_lists_every_task_of_the_library() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \| .* \| (?:log-odds|expected)", PAGE, re.MULTILINE) == [
        *library_tasks()
    ]
