"""Adapters that come and go lose no line of a batch, and none is scored with other weights."""

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from rankonce.ranker import Ranker
from rankonce.serving.batches.config import BatchConfig
from tests.model.test_adapters import build_adapter, build_base
from tests.serving.batches.conftest import Keeper, line
from tests.serving.conftest import serving
from tests.serving.test_models import load, unload

_BODY: dict[str, Any] = {
    "prompt": ["Film: Heat (1995)\nAnswer:", "Film: Big (1988)\nAnswer:"],
    "max_tokens": 1,
    "logprobs": 1,
    "labels": [" Yes", " No"],
}
_PATH = "/v1/completions"


def _scores(body: dict[str, Any]) -> list[float]:
    return [
        choice["logprobs"]["top_logprobs"][0][label]
        for choice in body["choices"]
        for label in (" Yes", " No")
    ]


def test_every_line_comes_back_while_an_adapter_leaves_and_another_comes(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    films = build_adapter(base, tmp_path / "films", seed=1, tasks=("movie-like",))
    jobs = build_adapter(base, tmp_path / "jobs", seed=2, tasks=("job-apply",))
    ranker = Ranker.from_pretrained(base, device="cpu")
    # Few at a time, so that most lines are still to come when the adapter leaves.
    batches = BatchConfig(data_dir=tmp_path / "data", max_lines_in_flight=2)
    with (
        serving(ranker, batches=batches, allow_adapter_loading=True) as http,
        OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as openai,
    ):
        keeper = Keeper(http=http, openai=openai, folder=tmp_path)
        assert load(http, "films", films).status_code == 200
        expected = {
            name: _scores(http.post(_PATH, json={**_BODY, "model": name}).json())
            for name in ("films", "base")
        }
        assert expected["films"] != pytest.approx(expected["base"], abs=1e-4)
        asked = {f"{name} {number}": name for number in range(60) for name in ("films", "base")}
        batch = keeper.create(
            _PATH, *(line(key, _PATH, {**_BODY, "model": name}) for key, name in asked.items())
        )
        assert unload(http, "films").status_code == 200
        assert load(http, "jobs", jobs).status_code == 200
        batch = keeper.wait(batch.id)
        assert batch.status == "completed"
        done = keeper.lines_of(batch.output_file_id)
        failed = keeper.lines_of(batch.error_file_id) if batch.error_file_id else []
        assert sorted(one["custom_id"] for one in done + failed) == sorted(asked)
        for one in done:
            name = asked[one["custom_id"]]
            scores = _scores(one["response"]["body"])
            assert scores == pytest.approx(expected[name], abs=1e-5)
        assert failed, "the adapter left before its last line"
        for one in failed:
            assert asked[one["custom_id"]] == "films"
            assert one["response"]["status_code"] == 404
            assert one["response"]["body"]["error"]["code"] == "model_not_found"
