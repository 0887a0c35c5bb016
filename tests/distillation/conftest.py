"""Planted examples, a small teacher that learnt them, and a second tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.test_loop import CONFIG, run, write_examples

SHORT = replace(CONFIG, epochs=1, averaging=0.0, dropout=0.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ``examples.jsonl`` and a trained ``teacher``."""
    folder = tmp_path_factory.mktemp("distillation")
    write_examples(folder / "examples.jsonl")
    run(folder, "teacher", replace(SHORT, epochs=6))
    return folder
