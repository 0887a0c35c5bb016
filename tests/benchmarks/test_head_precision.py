"""The comparison of heads: requests of many films, what rounding costs, and the picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from rankonce.benchmarks.head_precision import (
    HeadPrecisionOptions,
    describe_heads,
    make_requests,
    measure_heads,
    plot_heads,
)
from rankonce.errors import DataError
from rankonce.model.loading import load_model
from rankonce.ranker import EMBEDDED_MODEL


def test_a_rounded_head_gives_fewer_scores(tmp_path: Path, tokens_file: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    options = HeadPrecisionOptions(
        requests=tokens_file, sizes=("0.07m",), num_requests=2, num_candidates=35,
        levels=(0.0, 32.0),
    )  # fmt: skip
    record = measure_heads(options, on_pass=lambda *given: heard.append(given))
    assert record["requests"]["num_candidates"] == 70
    assert {name for name, _, _ in heard} == set(record["models"]) == {"embedded", "0.07m random"}
    assert all(done <= of for _, done, of in heard)
    for one in record["models"].values():
        ratio = {(h["head"], h["level"]): h["distinct_score_ratio"] for h in one["heads"]}
        assert ratio["fp32", 0.0] >= 0.98
        assert ratio["bf16", 32.0] < ratio["fp16", 32.0] <= ratio["fp32", 0.0]
        assert ratio["bf16", 32.0] < ratio["bf16", 0.0]
    assert len(describe_heads(record).splitlines()) == 2 + 2 * 5
    plot_heads(tmp_path / "heads.png", record)
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    model = load_model(EMBEDDED_MODEL, device="cpu")
    with pytest.raises(DataError, match="requests: should be 1 to 2, is 3"):
        make_requests(replace(options, num_requests=3), model)
