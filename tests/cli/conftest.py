"""A saved random model, requests as data, and a way to run the command line."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce import ranker
from rankonce.cli import main
from tests.conftest import build_network, build_request, build_tokenizer


@dataclass(frozen=True)
class Run:
    """What a command did."""

    exit_code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load each model once a session: a command that loads it again would do the same."""
    monkeypatch.setattr(ranker, "load_model", _load_once)


_load_once = cache(ranker.load_model)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*arguments: str | Path) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = exit_.value.code
        return Run(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_network("llama").save_pretrained(folder)
    build_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_without_z(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model that gives NaN for every prompt with a Z in it."""
    folder = tmp_path_factory.mktemp("model-without-z")
    network, tokenizer = build_network("llama"), build_tokenizer()
    with torch.no_grad():
        network.get_input_embeddings().weight[tokenizer("Z").input_ids] = torch.nan
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def requests() -> list[dict[str, Any]]:
    """Give requests of 1 to 5 candidates, each with its place as id."""
    made = [asdict(build_request(1 + seed % 5, seed=seed)) for seed in range(12)]
    return [json.loads(json.dumps({**one, "id": str(place)})) for place, one in enumerate(made)]


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """Write data as JSON and texts as they are, a line each."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path
