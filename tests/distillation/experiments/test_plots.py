"""Pictures of an experiment: what stands on the axes and where the points lie."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rankonce.distillation.experiments.declaration import Plot
from rankonce.distillation.experiments.plots import draw_plot

ROWS = [
    {"run": run, "seed": seed, "keep": keep, "auc": auc + seed / 100, "note": None}
    for run, auc in (("teacher", 0.7), ("cut", 0.5), ("taught", 0.6))
    for keep in (0.5, 0.3)
    for seed in (1, 3)
]


def points_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    (axes,) = figure.axes
    containers = axes.containers
    return {
        str(one.get_label()): [(float(x), float(y)) for x, y in one.lines[0].get_xydata()]
        for one in containers
    }


def test_numbers_on_x_are_sorted_and_averaged(tmp_path: Path) -> None:
    figure = draw_plot(tmp_path / "a.png", Plot(name="a", x="keep", y="auc"), ROWS)
    points = points_of(figure)
    assert list(points) == ["teacher", "cut", "taught"]
    assert np.array(points["cut"]) == pytest.approx(np.array([(0.3, 0.52), (0.5, 0.52)]))
    (bars,) = figure.axes[0].containers[1].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * np.std([0.51, 0.53], ddof=1))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_words_on_x_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    plot = Plot(name="a", x="run", y="auc", by="keep", title="Recovery")
    figure = draw_plot(tmp_path / "a.png", plot, ROWS)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["teacher", "cut", "taught"]
    points = points_of(figure)
    assert list(points) == ["0.5", "0.3"]
    assert np.array(points["0.3"]) == pytest.approx(np.array([(0, 0.72), (1, 0.52), (2, 0.62)]))
    assert axes.get_title() == "Recovery"


def test_a_run_is_subtracted_at_equal_settings_and_some_runs_are_shown(tmp_path: Path) -> None:
    plot = Plot(name="a", x="keep", y="auc", against="teacher", runs=["taught", "cut"])
    # At 0.3 there is no teacher to compare with.
    rows = [one for one in ROWS if not (one["run"] == "teacher" and one["keep"] == 0.3)]
    figure = draw_plot(tmp_path / "a.png", plot, rows, grid=("seed", "keep"))
    (axes,) = figure.axes
    points = points_of(figure)
    assert list(points) == ["cut", "taught"]
    assert np.array(points["taught"]) == pytest.approx(np.array([(0.5, -0.1)]))
    assert axes.get_ylabel() == "auc, less that of teacher"
    (bars,) = axes.containers[0].lines[2]
    # What the seeds share is gone.
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(0, abs=1e-9)


def test_where_x_is_measured_a_point_is_a_run_over_its_seeds(tmp_path: Path) -> None:
    rows = [{**one, "speed": one["auc"] * 10 + one["seed"]} for one in ROWS]
    plot = Plot(name="a", x="speed", y="auc", by="run")
    figure = draw_plot(
        tmp_path / "a.png", plot, rows, grid=("seed", "keep"), measured={"speed", "auc"}
    )
    points = points_of(figure)
    assert list(points) == ["teacher", "cut", "taught"]
    # One at each size.
    assert np.array(points["cut"]) == pytest.approx(np.array([(7.2, 0.52)] * 2))
    across, up = figure.axes[0].containers[1].lines[2]
    for bars, spread in ((across, np.std([6.1, 8.3], ddof=1)), (up, np.std([0.51, 0.53], ddof=1))):
        low, high = bars.get_segments()[0][[0, 1]]
        assert np.abs(high - low).max() == pytest.approx(2 * spread)


def test_rows_without_a_number_on_y_are_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, {"run": "failed", "keep": 0.1, "auc": None}]
    figure = draw_plot(tmp_path / "a.png", Plot(name="a", x="keep", y="auc"), rows)
    assert "failed" not in points_of(figure)
