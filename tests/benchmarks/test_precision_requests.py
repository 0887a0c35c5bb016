"""Requests that cannot be scored are refused, by line and field."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rankonce.benchmarks.precision import PrecisionOptions, run_precision
from rankonce.errors import DataError, RankOnceError
from tests.conftest import build_request


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 1: "),
        ("[]", "line 1: should be an object of label_ids, prefix_ids, segment_ids"),
        ({"segment_ids": []}, "line 1: segment_ids: should hold at least one candidate"),
        ({"segment_ids": [[5], []]}, r"segment_ids\[1\]: should hold at least one token id"),
        ({"segment_ids": [[-1]]}, r"segment_ids\[0\]: should be a list of token ids"),
        ({"prefix_ids": "5"}, "prefix_ids: should be a list of token ids"),
        ({"label_ids": [[5]]}, "label_ids: should hold two labels or more, holds 1"),
        ({"labels": [1]}, "labels: should be a list of 1, 0 or null, one a candidate"),
        ({"labels": [2, 0]}, "labels: should be a list of 1, 0 or null, one a candidate"),
        ({"segment_ids": [[7], [7]]}, "should hold a request with two different candidates"),
        ({"segment_ids": [[7], [99999]]}, "request 1: tokenizer: has token 99999"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(
    tmp_path: Path, line: str | dict[str, Any], fault: str
) -> None:
    good = {"prefix_ids": [5], "segment_ids": [[6], [7]], "label_ids": [[8], [9]]}
    path = tmp_path / "tokens.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps({**good, **line}))
    with pytest.raises(RankOnceError, match=fault):
        run_precision(PrecisionOptions(tokens=path, output=tmp_path / "x.json", device="cpu"))
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"candidates": []}, "line 1: candidates: should hold at least one candidate"),
        ({"labels": ["Yes"]}, "line 1: labels: should be a list with one label a candidate"),
        ({"labels": ["Yes", "Perhaps"]}, "line 1: labels: should be of Yes, No or null"),
        (
            {"task": "movie-rating", "history": [], "profile": {}},
            "line 1: task: movie-rating does not rank by its first label",
        ),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({**asdict(build_request(2)), **changes}))
    with pytest.raises(DataError, match=fault):
        run_precision(PrecisionOptions(requests=path, output=tmp_path / "x.json", device="cpu"))
