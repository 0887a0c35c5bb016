"""``rankonce crossvalidate`` on a small collection of planted relevance."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.search_collection import cranfield_tables, planted_set

Command = Callable[..., Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    for name, table in cranfield_tables(planted_set()).items():
        table.write_parquet(folder / f"{name}.parquet")
    return folder


def test_rankers_are_compared_with_bm25_and_a_second_run_only_reads(
    run: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("--data", data, "--out", out, "--num-folds", 2, "--num-resamples", 20)
    name = "logistic regression on the evidence"
    done = run("crossvalidate", "cranfield", *arguments, "--ranker", name, "--json")
    assert done.exit_code == 0, done.err
    result = json.loads(done.out)
    rows = {row["name"]: row["metrics"] for row in result["metrics"]}
    assert list(rows) == ["BM25", name]
    assert rows[name]["ndcg@10"] > rows["BM25"]["ndcg@10"] + 0.1
    assert len(result["bm25"]) == 2
    assert result["environment"]["commit"]

    kept = {path: path.stat().st_mtime_ns for path in out.glob("fold-*/*.json")}
    assert len(kept) == 4
    # Its tables are a dataset in the common form, which serves as well as the files.
    again = run(
        "crossvalidate",
        "cranfield",
        *("--data", out / "dataset", *arguments[2:], "--ranker", name, "--markdown"),
    )
    assert f"{rows[name]['ndcg@10']:.4f}" in again.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_unknown_ranker_is_bad_usage(run: Command, data: Path, tmp_path: Path) -> None:
    done = run(
        "crossvalidate", "cranfield", "--data", data, "--out", tmp_path, "--ranker", "oracle"
    )
    assert done.exit_code == 2
    assert "oracle" in done.err


def test_a_folder_without_the_files_is_named(run: Command, tmp_path: Path) -> None:
    done = run("crossvalidate", "cranfield", "--data", tmp_path, "--out", tmp_path / "out")
    assert (done.exit_code, done.err.splitlines()[-1]) == (
        1,
        f"error: {tmp_path}: should hold files of cranfield: docs.parquet, queries.parquet, "
        "qrels.parquet",
    )
