"""Baselines on the real rows, and what they refuse."""

import subprocess
import sys
from functools import cache

import numpy as np
import polars as pl
import pytest

from rankonce.errors import DataError, MissingDependencyError
from rankonce.evaluation.baselines import BASELINES
from rankonce.evaluation.metrics import auc, log_loss, uauc
from tests.conftest import data_folder
from tests.datasets.test_movie_columns import ITEMS, draw_rows


@cache
def read_movielens() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    folder = data_folder("ml1m")
    train, items, rows = (
        pl.read_parquet(folder / f"{name}.parquet") for name in ("train", "items", "valid")
    )
    return train, items, rows


@pytest.mark.parametrize("name", BASELINES)
def test_labels_of_the_rows_to_be_scored_are_not_read(name: str) -> None:
    train, rows = draw_rows(300), draw_rows(40, start=1000, seed=1)
    scores = BASELINES[name](train, ITEMS, rows)
    assert np.array_equal(scores, BASELINES[name](train, ITEMS, rows.drop("label")))
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize(
    ("name", "expected_auc", "expected_uauc", "expected_loss"),
    [
        ("item mean", 0.690, 0.688, 0.635),
        ("item mean + user mean", 0.736, 0.688, 0.600),
        ("LightGBM", 0.745, 0.687, 0.593),
    ],
)
def test_baselines_reach_their_known_quality_on_movielens(
    name: str, expected_auc: float, expected_uauc: float, expected_loss: float
) -> None:
    train, items, rows = read_movielens()
    scores = BASELINES[name](train, items, rows)
    assert auc(rows["label"], scores) == pytest.approx(expected_auc, abs=0.004)
    assert uauc(rows["label"], scores, rows["user_id"]) == pytest.approx(expected_uauc, abs=0.008)
    assert log_loss(rows["label"], scores) == pytest.approx(expected_loss, abs=0.004)


def test_lightgbm_gives_the_same_scores_twice() -> None:
    train, rows = draw_rows(400), draw_rows(40, start=1000, seed=1)
    first, second = (BASELINES["LightGBM"](train, ITEMS, rows) for _ in range(2))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) > 1


def test_a_missing_lightgbm_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingDependencyError, match=r"rankonce\[eval\]"):
        BASELINES["LightGBM"](draw_rows(40), ITEMS, draw_rows(4, start=100))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (draw_rows(40).with_columns(timestamp=pl.lit(7)), "timestamp: train rows should have at"),
        (draw_rows(40).drop("label"), "label: should be a column"),
    ],
)
@pytest.mark.parametrize("name", BASELINES)
def test_train_rows_that_cannot_be_used_are_refused_by_name(
    name: str, rows: pl.DataFrame, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        BASELINES[name](rows, ITEMS, draw_rows(4, start=100))


def test_evaluation_is_imported_without_torch_and_without_its_extra() -> None:
    code = (
        "import sys; from rankonce.evaluation import baselines, metrics, report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightgbm', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
