"""Calibrations: rising, exact where they should be, tied to the weights they were fitted with."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rankonce.calibration import (
    CALIBRATION_FILE,
    Calibration,
    Floats,
    calibrate_log_probs,
    read_calibrations,
    relevance_logits,
    scaled_grades,
    write_calibrations,
)
from rankonce.errors import ModelError
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import ScoreRequest
from tests.conftest import build_request
from tests.model.test_adapters import build_adapter, build_base

KNOTS = ((-3.0, 0.1), (-1.0, 0.25), (0.5, 0.25), (2.0, 0.9))
METHODS = [
    Calibration(method="temperature", slope=0.37),
    Calibration(method="platt", slope=1.7, offset=-0.6),
    Calibration(method="isotonic", knots=KNOTS),
]
TASKS = ["movie-like", "search-relevance", "movie-rating"]


def draw_log_probs(task: str, num_candidates: int = 63) -> Floats:
    shape = (num_candidates, len(library_tasks()[task].labels))
    scores_CL = np.random.default_rng(3).normal(scale=3.0, size=shape)
    return np.asarray(scores_CL - np.logaddexp.reduce(scores_CL, axis=1)[:, None])


def build_rating(num_candidates: int) -> ScoreRequest:
    return replace(build_request(num_candidates, task="movie-rating"), history=(), profile={})


def raw_values(task: str, log_probs_CL: Floats) -> list[float]:
    names = library_tasks()[task].label_names
    return [
        library_tasks()[task].ranking_value(dict(zip(names, row, strict=True)))
        for row in log_probs_CL.tolist()
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("calibration", METHODS, ids=lambda one: one.method)
def test_no_calibration_changes_an_order(task: str, calibration: Calibration) -> None:
    log_probs_CL = draw_log_probs(task)
    calibrated_CL, values_C = calibrate_log_probs(log_probs_CL, library_tasks()[task], calibration)
    order = np.argsort(raw_values(task, log_probs_CL))
    assert (np.diff(values_C[order]) >= -1e-12).all()
    assert np.exp(calibrated_CL).sum(axis=1) == pytest.approx(np.ones(63), abs=1e-12)
    # The value is still the task's function of the probabilities.
    assert values_C == pytest.approx(raw_values(task, calibrated_CL), abs=1e-7)


def test_the_temperature_of_two_labels_is_a_softmax_over_it() -> None:
    log_probs_CL = draw_log_probs("movie-like")
    calibration = Calibration(method="temperature", slope=1 / 2.5)
    calibrated_CL, _ = calibrate_log_probs(log_probs_CL, library_tasks()["movie-like"], calibration)
    expected = torch.tensor(log_probs_CL / 2.5).log_softmax(dim=1)
    assert calibrated_CL == pytest.approx(expected.numpy(), abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_slope_1_leaves_everything_as_it_is(task: str) -> None:
    log_probs_CL = draw_log_probs(task)
    same = Calibration(method="platt", slope=1.0, offset=0.0)
    calibrated_CL, values_C = calibrate_log_probs(log_probs_CL, library_tasks()[task], same)
    assert calibrated_CL == pytest.approx(log_probs_CL, abs=1e-7)
    assert values_C == pytest.approx(raw_values(task, log_probs_CL), abs=1e-7)


def test_grades_keep_their_proportions_but_for_a_tilt_by_their_worth() -> None:
    task = library_tasks()["search-relevance"]
    log_probs_CL = draw_log_probs(task.name)
    calibrated_CL, _ = calibrate_log_probs(log_probs_CL, task, METHODS[1])
    grades_L = scaled_grades(task)
    assert grades_L.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    moved_CL = calibrated_CL - log_probs_CL
    steps = np.diff(moved_CL, axis=1)
    assert steps == pytest.approx(np.repeat(steps[:, :1], 4, axis=1), abs=1e-9)
    targets_C = METHODS[1].apply(relevance_logits(log_probs_CL, grades_L))
    assert relevance_logits(calibrated_CL, grades_L) == pytest.approx(targets_C, abs=1e-7)


def test_isotonic_is_straight_between_knots_and_level_outside() -> None:
    shares = 1 / (1 + np.exp(-METHODS[2].apply(np.array([-9.0, -2.0, 0.0, 1.25, 9.0]))))
    assert shares == pytest.approx([0.1, 0.175, 0.25, 0.575, 0.9], abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "platt", "slope": 0.0}, "slope"),
        ({"method": "platt", "slope": float("nan")}, "slope"),
        ({"method": "isotonic"}, "knots: should be there"),
        ({"method": "isotonic", "knots": [[0, 0.5], [1, 0.4]]}, "knots: should rise"),
        ({"method": "isotonic", "knots": [[0, 0.0], [1, 1.0]]}, "knots"),
        ({"method": "magic"}, "method"),
    ],
)
def test_a_function_that_could_change_an_order_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    table = {"version": 1, "weights": "", "tasks": {"movie-like": fields}}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(table))
    with pytest.raises(ModelError, match=message):
        read_calibrations(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_base(tmp_path_factory.mktemp("calibrated") / "tiny")
    write_calibrations(folder, {"movie-like": METHODS[2]})
    return folder


@pytest.fixture(scope="module")
def ranker(base: Path) -> Ranker:
    return Ranker.from_pretrained(base, device="cpu")


def test_a_ranker_calibrates_by_what_lies_beside_the_weights(base: Path, ranker: Ranker) -> None:
    plain = Ranker.from_pretrained(base, device="cpu", config=RankerConfig(calibrate=False))
    raw, calibrated = (one.score(build_request(63)) for one in (plain, ranker))
    assert (raw.calibration, calibrated.calibration) == (None, "isotonic")
    assert [one.rank for one in calibrated.candidates] == [one.rank for one in raw.candidates]
    assert calibrated.distinct_score_ratio == raw.distinct_score_ratio
    logits = np.array([one.value for one in raw.candidates])
    for before, one, expected in zip(
        raw.candidates, calibrated.candidates, METHODS[2].apply(logits).tolist(), strict=True
    ):
        assert one.value == pytest.approx(expected, abs=1e-5)
        assert one.raw_value == pytest.approx(before.value, abs=1e-5)
        assert one.raw_log_probs == pytest.approx(before.log_probs, abs=1e-5)
        assert before.raw_value is None
    # A level part ties what the model tells apart; the ranks still do.
    assert len({one.value for one in calibrated.candidates}) < len(logits)


def test_another_task_or_an_instruction_of_its_own_is_not_calibrated(ranker: Ranker) -> None:
    assert ranker.score(build_rating(2)).calibration is None
    own = ranker.score(replace(build_request(2), instruction="Be strict."))
    assert own.calibration is None
    assert any(warning.startswith("instruction: ") for warning in own.warnings)
    assert not any("instruction" in warning for warning in ranker.score(build_request(2)).warnings)


def test_a_calibration_of_other_weights_is_refused(base: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", seed=5)
    (other / CALIBRATION_FILE).write_bytes((base / CALIBRATION_FILE).read_bytes())
    with pytest.raises(ModelError, match="was fitted with other weights"):
        Ranker.from_pretrained(other, device="cpu")
    Ranker.from_pretrained(other, device="cpu", config=RankerConfig(calibrate=False))
    write_calibrations(other, {"movie-rating": METHODS[1]})
    assert set(read_calibrations(other)) == {"movie-rating"}


def test_an_adapter_has_its_own_and_the_tasks_are_kept_apart(base: Path, tmp_path: Path) -> None:
    films = build_adapter(base, tmp_path / "films", seed=1, tasks=("movie-like",))
    write_calibrations(films, {"movie-like": METHODS[0]})
    write_calibrations(films, {"movie-rating": METHODS[1]})
    ranker = Ranker.from_pretrained(base, device="cpu", adapters={"films": films})
    request = build_request(3)
    methods = [ranker.score(replace(request, adapter=name)).calibration for name in ("films", "")]
    assert methods == ["temperature", "isotonic"]
    assert ranker.score(replace(build_rating(3), adapter="films")).calibration == "platt"
