"""The embedded ranker, quantised once a session and scheme."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from rankonce.distillation.quantization import QuantizationOptions, quantize_model
from rankonce.ranker import EMBEDDED_MODEL


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
