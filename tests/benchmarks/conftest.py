"""Tokenised requests for the comparison of precisions."""

from pathlib import Path

import numpy as np
import pytest

from rankonce.evaluation.labelled_requests import LabelledRequest, write_tokens
from rankonce.layout import TokenizedRequest


def tokens_of(num_candidates: int, *, seed: int = 0, num_labels: int = 2) -> TokenizedRequest:
    generator = np.random.default_rng(seed)
    return TokenizedRequest(
        prefix_ids=tuple(generator.integers(5, 600, 20).tolist()),
        segment_ids=tuple(
            tuple(generator.integers(5, 600, 2 + index % 5).tolist())
            for index in range(num_candidates)
        ),
        label_ids=tuple((300 + label, 310 + label) for label in range(num_labels)),
    )


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.jsonl"
    requests = [
        LabelledRequest(tokens=tokens_of(size, seed=size), labels=(1, 0, None) * (size // 3))
        for size in (3, 63)
    ]
    write_tokens(path, requests)
    return path
