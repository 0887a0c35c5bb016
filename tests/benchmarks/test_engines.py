"""Engines side by side."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.benchmarks.engines import EngineBenchmark, describe_engines, measure_engines
from rankonce.benchmarks.serve_workloads import MEMBER
from rankonce.errors import DataError
from rankonce.model.sizes import build_model
from rankonce.ranker import EMBEDDED_MODEL
from rankonce.serving.backends.opening import EngineOptions
from tests.serving.backends.engine_server import Plain, create_engine_app
from tests.serving.conftest import serving_app

WORKLOAD = replace(MEMBER, prefix_tokens=250, num_candidates=5, candidate_tokens=20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    network = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    plain = Plain(network.eval())
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(EMBEDDED_MODEL))
    with serving_app(app) as client:
        yield str(client.base_url)


def options_of(url: str, tmp_path: Path, model: Path) -> EngineBenchmark:
    kinds = ("vllm", "sglang")
    others = [EngineOptions(engine=kind, url=url, served_name="tiny") for kind in kinds]
    return EngineBenchmark(
        engines=[None, *others],
        model=model,
        workload=WORKLOAD,
        num_requests=2,
        output=tmp_path / "engines.json",
    )


def test_engines_stand_side_by_side(url: str, tmp_path: Path) -> None:
    record = measure_engines(options_of(url, tmp_path, EMBEDDED_MODEL))
    assert json.loads((tmp_path / "engines.json").read_text()) == record
    native, vllm, sglang = record["engines"]
    assert [arm["engine"] for arm in record["engines"]] == ["native", "vllm", "sglang"]
    for arm in record["engines"]:
        assert arm["greatest_difference"] < 1e-5
        assert len(arm["times_ms"]) == 2
        assert 0 < arm["median_ms"] <= arm["slowest_ms"] == max(arm["times_ms"])
        assert arm["candidates_per_s"] == pytest.approx(10_000 / sum(arm["times_ms"]))
    # The task's instruction is what members have in common.
    assert native["computed_tokens"] + native["cached_tokens"] == 250 + 5 * 20
    assert vllm["computed_tokens"] + vllm["cached_tokens"] == 5 * 270
    assert native["computed_tokens"] < vllm["computed_tokens"] < sglang["computed_tokens"]
    assert sglang["computed_tokens"] == 5 * 270
    table = describe_engines(record)
    assert "| rankonce 0.1.0 |" in table
    assert f"| vllm at {url} |" in table


def test_engines_with_other_weights_are_not_compared(url: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_model("0.16m", seed=5).save_pretrained(other)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(other)
    with pytest.raises(DataError, match="vllm: scores differ from the first engine's by"):
        measure_engines(options_of(url, tmp_path, other))
    assert not (tmp_path / "engines.json").exists()
