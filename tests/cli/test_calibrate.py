"""``rankonce calibrate``: fits, prints what it measured, and everything after it is calibrated."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rankonce.ranker import Ranker, RankerConfig
from tests.cli.conftest import Run, write_lines
from tests.conftest import build_request
from tests.model.test_adapters import build_base
from tests.serving.conftest import serving

Command = Callable[..., Run]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("calibrate") / "tiny")


@pytest.fixture(scope="module")
def examples(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write labels that are half as sure as the model is."""
    ranker = Ranker.from_pretrained(model, device="cpu", config=RankerConfig(calibrate=False))
    random = np.random.default_rng(0)
    lines = []
    for seed in range(40):
        request = build_request(11, seed=seed)
        values = np.array([one.value for one in ranker.score(request).candidates])
        likes = random.random(11) < 1 / (1 + np.exp(-values / 2))
        lines.append({**asdict(request), "labels": ["Yes" if like else "No" for like in likes]})
    return write_lines(tmp_path_factory.mktemp("labels") / "examples.jsonl", lines)


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_scores_are_calibrated_from_then_on_and_the_raw_ones_stay(
    run: Command, model: Path, examples: Path, tmp_path: Path, method: str
) -> None:
    requests = write_lines(tmp_path / "requests.jsonl", [asdict(build_request(7, seed=99))])
    (model / "calibration.json").unlink(missing_ok=True)
    (raw,) = run("score", requests, "--model", model).records
    assert raw["calibration"] is None
    for one in raw["candidates"]:
        assert (one["raw_value"], one["raw_probabilities"]) == (one["value"], None)
    fitted = run("calibrate", "--model", model, "--data", examples, "--method", method, "--json")
    measured = json.loads(fitted.out)["tasks"]["movie-like"]["measured"]
    assert measured["log_loss_after"] < measured["log_loss_before"]
    assert measured["num_fitted"] + measured["num_held_out"] == 440
    (calibrated,) = run("score", requests, "--model", model).records
    assert calibrated["calibration"] == method
    for before, after in zip(raw["candidates"], calibrated["candidates"], strict=True):
        assert after["raw_value"] == pytest.approx(before["value"], abs=1e-5)
        assert after["raw_probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)
        assert after["rank"] == before["rank"]
    moved = [one["value"] for one in calibrated["candidates"]]
    assert moved != pytest.approx([one["value"] for one in raw["candidates"]], abs=1e-2)
    with serving(Ranker.from_pretrained(model, device="cpu")) as http:
        answer = http.post("/v1/rank", json=asdict(build_request(7, seed=99))).json()
    assert answer["calibration"] == method
    for served, one in zip(answer["results"], calibrated["candidates"], strict=True):
        for name in ("value", "raw_value", "probabilities", "raw_probabilities"):
            assert served[name] == pytest.approx(one[name], abs=1e-5)


def test_the_table_shows_both_measures_before_and_after(
    run: Command, model: Path, examples: Path
) -> None:
    shown = run("calibrate", "--model", model, "--data", examples, "--seed", "3")
    record = json.loads((model / "calibration.json").read_text())
    measured = record["tasks"]["movie-like"]["measured"]
    for name in ("log_loss", "calibration_error"):
        for when in ("before", "after"):
            assert f"{measured[f'{name}_{when}']:.4f}" in shown.out
    assert "calibration.json" in shown.err


def test_rows_need_what_is_known_of_members_and_films(
    run: Command, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.parquet").touch()
    failed = run("calibrate", "--model", model, "--data", tmp_path / "rows.parquet")
    assert failed.exit_code == 2
    assert "--train" in failed.err
