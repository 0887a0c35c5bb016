"""Planted examples, a small teacher that learnt them, and the embedded ranker quantised."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from rankonce.distillation.quantization import QuantizationOptions, quantize_model
from rankonce.ranker import EMBEDDED_MODEL
from tests.training.test_loop import CONFIG, run, write_examples

SHORT = replace(CONFIG, epochs=1, averaging=0.0, dropout=0.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ``examples.jsonl`` and a trained ``teacher``."""
    folder = tmp_path_factory.mktemp("distillation")
    write_examples(folder / "examples.jsonl")
    run(folder, "teacher", replace(SHORT, epochs=6))
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a quantised checkpoint by the name of its scheme."""

    def write(scheme: str) -> Path:
        out = tmp_path_factory.mktemp("quantised") / scheme
        options = QuantizationOptions(
            model=str(EMBEDDED_MODEL), out=out, scheme=scheme, device="cpu"
        )
        quantize_model(options)
        return out

    return cache(write)
